"""Rewrites of `torch.compile`'s graphs: hooks (`manager`), recognisers (`normalize/`), fi ops in their place (`fuse/`)."""

from .explain import Explanation, explain
from .manager import disable, enable, enabled

__all__ = ["Explanation", "disable", "enable", "enabled", "explain"]
