"""Metadata checks for fakes. `csrc/binding/check.h` has the same checks with the same texts for the kernels.

Message: `fi::<op>: <argument> <what was expected>, got <what came>; <what to do>`. Sizes may be SymInts: nothing here
specialises them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def check(op: str, condition, message: Callable[[], str]) -> None:
    """Raise RuntimeError `fi::<op>: <message>` unless `condition` (bool or SymBool) holds."""
    torch._check(condition, lambda: f"fi::{op}: {message()}")


def all_of(*conditions):
    """The conjunction of bools and SymBools, without asking a SymBool for its value."""
    result = True
    for c in conditions:
        if isinstance(c, bool):
            if not c:
                return False
        else:
            result = c if result is True else result & c
    return result


def any_of(*conditions):
    """The disjunction of bools and SymBools, without asking a SymBool for its value."""
    result = False
    for c in conditions:
        if isinstance(c, bool):
            if c:
                return True
        else:
            result = c if result is False else result | c
    return result


def shape_of(t: torch.Tensor) -> str:
    return "[" + ", ".join(str(s) for s in t.shape) + "]"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_no_grad(op: str, args: Sequence, kwargs: dict) -> None:
    """These ops have no backward: say so instead of losing gradients silently."""
    if torch.is_grad_enabled():
        grads = any(isinstance(v, torch.Tensor) and v.requires_grad for v in (*args, *kwargs.values()))
        check(op, not grads, lambda: "has no backward, got an input that requires grad; call it under torch.no_grad()")


def check_dtype(op: str, name: str, t: torch.Tensor, allowed: Sequence[torch.dtype]) -> None:
    names = [dtype_name(d) for d in allowed]
    text = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1]
    check(op, t.dtype in allowed, lambda: f"{name} must be {text}, got {dtype_name(t.dtype)}; convert it with .to()")


def check_same_dtype(op: str, name: str, t: torch.Tensor, ref_name: str, ref: torch.Tensor) -> None:
    check(
        op,
        t.dtype == ref.dtype,
        lambda: (
            f"{name} must have {ref_name}'s dtype {dtype_name(ref.dtype)}, got {dtype_name(t.dtype)}; convert it with .to()"
        ),
    )


def check_same_device(op: str, name: str, t: torch.Tensor, ref_name: str, ref: torch.Tensor) -> None:
    check(
        op,
        t.device == ref.device,
        lambda: f"{name} must be on {ref_name}'s device {ref.device}, got {t.device}; move it with .to()",
    )


def check_ndim(op: str, name: str, t: torch.Tensor, ndim: int, layout: str) -> None:
    check(op, t.dim() == ndim, lambda: f"{name} must be {layout}, got {shape_of(t)}; reshape it to {ndim} dimensions")


def check_shape(op: str, name: str, t: torch.Tensor, shape: Sequence, layout: str) -> None:
    """`t` must have exactly `shape`; `layout` names the dimensions, e.g. `[batch, num_kv_heads, kv_len, head_dim]`."""
    ok = t.dim() == len(shape)
    if ok:
        ok = all_of(*(have == want for have, want in zip(t.shape, shape, strict=True)))
    want_text = "[" + ", ".join(str(s) for s in shape) + "]"
    check(
        op,
        ok,
        lambda: (
            f"{name} must be {layout} = {want_text}, got {shape_of(t)}; check the sizes against the other arguments"
        ),
    )


def check_last_dim_contiguous(op: str, name: str, t: torch.Tensor) -> None:
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    def strides() -> str:
        return "[" + ", ".join(str(s) for s in t.stride()) + "]"

    if t.dim() > 0:
        ok = guard_or_true(any_of(t.stride(-1) == 1, t.shape[-1] <= 1, t.numel() == 0))
        check(
            op,
            ok,
            lambda: f"{name} must have a contiguous last dimension, got strides {strides()}; call .contiguous() on it",
        )


def check_writable(op: str, name: str, t: torch.Tensor) -> None:
    """An argument that the op writes must have memory of its own for every element: no expanded dimension."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    expanded = guard_or_false(
        any_of(*(all_of(stride == 0, size > 1) for size, stride in zip(t.shape, t.stride(), strict=True)))
    )
    strides = "[" + ", ".join(str(s) for s in t.stride()) + "]"
    check(
        op,
        not expanded,
        lambda: f"{name} is written and must not be expanded, got strides {strides}; call .contiguous() on it",
    )
