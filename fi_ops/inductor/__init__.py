"""Rewrites of `torch.compile`'s graphs: hooks (`manager`), recognisers (`normalize/`), fi ops in their place (`fuse/`)."""

from .manager import disable, enable, enabled

__all__ = ["disable", "enable", "enabled"]
