"""enable() and disable(): our three passes in Inductor's slots, next to whatever was there.

    pre_grad_custom_pass          hook A   pin       torch-level graph
    joint_custom_pre_pass         hook B   rewrite   functional ATen graph
    post_grad_custom_post_pass    hook C   verify    no anchor is left

Each pass has a `uuid`, without which Inductor would bypass its caches; it covers our version, our sources, the schemas of
all fi ops and the options. torch 2.13 takes lists of passes, 2.11 one pass a slot: passes that were there run first, as part
of the same pass object.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import torch._inductor.config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from . import anchors, options
from .options import Options
from .sites import warn_once
from .support import device_key
from .walk import is_call

log = logging.getLogger("fi_ops.inductor")


@functools.cache
def _source_hash() -> str:
    """Our sources and the schemas of all ops: what decides how a graph is rewritten."""
    from .. import library

    digest = hashlib.sha256(library.schema_text().encode())
    for path in sorted(pathlib.Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def cache_key() -> str:
    """Goes into the key of every compiled graph: with it, graphs compiled under other options are not shared. FI_OPS_REQUIRE
    is part of it: a graph that is in the cache was checked when it was compiled, under the same requirements."""
    import fi_ops

    version = getattr(fi_ops, "__version__", "0")
    required = os.environ.get("FI_OPS_REQUIRE", "")
    return f"fi_ops {version} {_source_hash()} devices={device_key()} {options.current()} require={required}"


class ChainedPass(CustomGraphPass):
    """The passes that were in a slot, then ours."""

    def __init__(self, name: str, ours: Callable[[Graph], None], before: Any):
        self.name = name
        self.ours = ours
        self.before = before

    @property
    def previous(self) -> tuple:
        if self.before is None:
            return ()
        return tuple(self.before) if isinstance(self.before, (list, tuple)) else (self.before,)

    def __call__(self, graph: Graph) -> None:
        for other in self.previous:
            other(graph)
        self.ours(graph)

    def uuid(self) -> Any | None:
        """None where a pass that was here has none: then Inductor can't cache, with us as without us."""
        parts = [self.name, cache_key()]
        for other in self.previous:
            uuid = other.uuid() if isinstance(other, CustomGraphPass) else None
            if uuid is None:
                return None
            parts.append(repr(uuid))
        return "|".join(parts)


def _pin(graph: Graph) -> None:
    from .pin import pin

    pin(graph)


def _rewrite(graph: Graph) -> None:
    from .rewrite import rewrite

    rewrite(graph)


def _verify(graph: Graph) -> None:
    left = [n for n in graph.nodes if is_call(n, anchors.SDPA)]
    if left:
        warn_once(
            "anchor left", f"fi_ops: {len(left)} SDPA calls were not lowered and run in eager; please report this"
        )


_SLOTS = {
    "pre_grad_custom_pass": _pin,
    "joint_custom_pre_pass": _rewrite,
    "post_grad_custom_post_pass": _verify,
}
_TIMING = "pre_grad_pass_timing"
"""torch 2.13: "early" runs hook A before the cache lookup, on every compile, as torch 2.11 always does."""

_saved: dict[str, Any] | None = None


def is_enabled() -> bool:
    return _saved is not None


def enable(*, sampling: bool | None = None) -> None:
    """Rewrite attention, RoPE, samplers and linear layers of few rows in everything that `torch.compile` compiles from now on.

    Works with the default backend ("inductor"), in every mode. Functions compiled before stay as they are until they
    are compiled again.

    Args:
        sampling: whether samplers are rewritten: same distribution, other random numbers (after `torch.manual_seed` the same
            from run to run, but not stock torch's). False leaves them to stock torch. None: as it is where the rewrites
            are enabled already, else True.
    """
    wanted = _options(sampling)
    if not is_enabled() or wanted != options.current():
        _warn_of_earlier_compiles()
    _install(wanted)


def _options(sampling: bool | None) -> Options:
    known = options.current() if is_enabled() else Options()
    return known if sampling is None else Options(sampling=sampling)


def _install(wanted: Options) -> None:
    global _saved
    options.set_current(wanted)
    if _saved is not None:
        return
    _saved = {slot: getattr(inductor_config, slot) for slot in _SLOTS}
    for slot, ours in _SLOTS.items():
        setattr(inductor_config, slot, ChainedPass(slot, ours, _saved[slot]))
    if hasattr(inductor_config, _TIMING):
        _saved[_TIMING] = getattr(inductor_config, _TIMING)
        setattr(inductor_config, _TIMING, "early")


def disable() -> None:
    """Undo `enable()`: every slot holds what it held before. What was compiled meanwhile stays as it is."""
    global _saved
    options.set_current(Options())
    if _saved is None:
        return
    for slot, previous in _saved.items():
        current = getattr(inductor_config, slot)
        if slot in _SLOTS and not isinstance(current, ChainedPass):
            current = _without_ours(current)
            if current is not _NOT_FOUND:
                setattr(inductor_config, slot, current)
                continue
            log.warning("fi_ops: %s was replaced after enable(); it is left as it is", slot)
            continue
        setattr(inductor_config, slot, previous)
    _saved = None


_NOT_FOUND = object()


def _without_ours(current: Any) -> Any:
    """A list in which someone put passes next to ours, with ours replaced by what ours had replaced."""
    if not isinstance(current, (list, tuple)) or not any(isinstance(p, ChainedPass) for p in current):
        return _NOT_FOUND
    rest = [q for p in current for q in (p.previous if isinstance(p, ChainedPass) else (p,))]
    return type(current)(rest)


@contextlib.contextmanager
def enabled(on: bool = True, *, sampling: bool | None = None) -> Iterator[None]:
    """`with fi_ops.enabled():` what is compiled inside is rewritten; `enabled(False)` switches it off inside. `sampling` as
    in `enable`; what held before holds again behind."""
    if on and (not is_enabled() or _options(sampling) != options.current()):
        _warn_of_earlier_compiles()
    with switched(on, sampling=sampling):
        yield


@contextlib.contextmanager
def switched(on: bool, *, sampling: bool | None = None) -> Iterator[None]:
    """`enabled`, without a word about functions compiled earlier."""
    was, earlier = is_enabled(), options.current()
    if on:
        _install(_options(sampling))
    else:
        disable()
    try:
        yield
    finally:
        if was:
            _install(earlier)
        else:
            disable()


def _warn_of_earlier_compiles() -> None:
    """Dynamo does not know about Inductor's settings: say once that earlier functions keep their code."""
    from torch._dynamo.utils import counters

    if counters["stats"].get("unique_graphs", 0):
        warn_once(
            "compiled before",
            "fi_ops.enable(): functions that torch.compile compiled before this call stay as they are; "
            "call torch._dynamo.reset() or enable fi_ops first to have them rewritten",
        )
