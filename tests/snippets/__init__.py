"""Spellings of attention, RoPE, caches and samplers as models have them, and near misses of each.

A snippet is a function, its inputs, and what must become of it: the grade of its attention sites, or a reason why it
is left alone. `test_inductor_snippets.py` compiles each one and compares with eager. To add a model's spelling: add a snippet.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Snippet:
    name: str
    fn: Callable
    inputs: Callable[[], tuple]
    grade: str
    """Of every attention (or sampling) site; "" for left as it is."""
    reason: str
    """A regular expression that a site's reason must match: why not (more)."""
    kind: str = "attention"
    rotated: bool | None = None
    """Whether RoPE is fused; None where there is none."""
    dynamic_grade: str | None = None
    """The grade with every size symbolic, where it is another one."""


SNIPPETS: dict[str, Snippet] = {}

FULL = "rope + append + attention"


def snippet(inputs: Callable[[], tuple], grade: str = "attention", reason: str = "", **options) -> Callable:
    def register(fn: Callable) -> Callable:
        name = f"{fn.__module__.rpartition('.')[2]}.{fn.__name__}"
        SNIPPETS[name] = Snippet(name, fn, inputs, grade, reason, **options)
        return fn

    return register


def load() -> dict[str, Snippet]:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return SNIPPETS
