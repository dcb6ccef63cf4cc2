"""What `enable()` was asked for: which of the rewrites are made. The key of a compiled graph has it (`manager.cache_key`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """One value for all that is compiled while it is set. Fields are kinds of sites (`sites.KINDS`)."""

    sampling: bool = True
    """Samplers become fi ops, whose random numbers are other ones than torch's."""


_current = Options()


def current() -> Options:
    return _current


def set_current(options: Options) -> None:
    global _current
    _current = options


def switched_on(kind: str) -> bool:
    """Whether sites of this kind are rewritten; those without an option always are."""
    return getattr(_current, kind, True)
