"""Test kit: the error budget, canaries, and checks of an op against its spec. Public, so that users can test their own variants.

The budget, instead of hand-picked tolerances: a kernel may err against float64 at most twice as much as the same
computation in torch in the op's own dtype does, plus one rounding of the largest value:
`err(kernel, fp64) <= 2 * (err(same-dtype torch, fp64) + eps(dtype) * max|ref|)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .library import OpSpec, Sample


@dataclass(frozen=True)
class Deviation:
    """The worst element of a comparison. `limit` is what the budget allows."""

    error: float
    limit: float
    position: tuple[int, ...]
    actual: float
    expected: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit

    def __str__(self) -> str:
        return (
            f"worst element at {list(self.position)}: got {self.actual:.8g}, expected {self.expected:.8g} "
            f"(error {self.error:.3g}, budget {self.limit:.3g})"
        )


def _same_where_not_finite(a: torch.Tensor, b: torch.Tensor) -> bool:
    special = ~torch.isfinite(b)
    return bool(
        torch.equal(torch.isfinite(a), ~special) and torch.equal(a[special].nan_to_num(7.0), b[special].nan_to_num(7.0))
    )


def deviation(actual: torch.Tensor, expected: torch.Tensor, same_dtype: torch.Tensor) -> Deviation:
    """Compare a kernel's `actual` with `expected` (the float64 reference), given the reference run in the op's dtype.

    Infinities and NaN must agree exactly. All three have the same shape.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {list(actual.shape)}, expected {list(expected.shape)}")
    a, e, s = (t.detach().cpu().double() for t in (actual, expected, same_dtype))
    in_range = (
        expected.detach().cpu().to(actual.dtype).double()
    )  # what the output's dtype can't hold is an infinity there
    if not _same_where_not_finite(a, in_range):
        raise AssertionError("infinities or NaN differ from the reference's")
    finite = torch.isfinite(in_range)
    if not bool(finite.any()):
        return Deviation(0.0, 0.0, (), 0.0, 0.0)
    gap = torch.where(finite, (a - e).abs(), 0)
    baseline = torch.where(finite & torch.isfinite(s), (s - e).abs(), 0).max().item()
    eps = torch.finfo(actual.dtype).eps
    limit = 2 * (baseline + eps * e[finite].abs().max().item())
    index = int(gap.argmax())
    position = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), gap.shape)) if gap.dim() else ()
    return Deviation(gap.flatten()[index].item(), limit, position, a.flatten()[index].item(), e.flatten()[index].item())


def assert_within_budget(
    actual: torch.Tensor, expected: torch.Tensor, same_dtype: torch.Tensor, what: str = ""
) -> None:
    """AssertionError with the worst element's position unless `actual` is inside the budget (see the module)."""
    result = deviation(actual, expected, same_dtype)
    assert result.ok, f"{what}: {result}"


def comparable(t: torch.Tensor) -> torch.Tensor:
    """`t` as `torch.equal` can compare it: with a number for NaN; 8-bit floats, which torch can do little with, as their bytes."""
    if t.dtype.is_floating_point and t.element_size() == 1:
        return t.view(torch.uint8)
    return t.nan_to_num(7.0)


# ---------------------------------------------------------------------------------------------------- memory guards


def with_canaries(t: torch.Tensor, margin: int = 64, device: torch.device | None = None) -> torch.Tensor:
    """A copy of `t` (same sizes, strides and values) inside a larger buffer whose every other element is a canary.

    NaN for floats, the lowest value for integers, True for bool. `canaries_intact` says later whether all are still there.
    The copy is on `device`, by default where `t` is.
    """
    device = device or t.device
    if t.numel() == 0:
        return t.to(device, copy=True)
    span = sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride(), strict=True)) + 1
    buffer = torch.full((span + 2 * margin,), _canary(t.dtype), dtype=t.dtype, device=device)
    view = torch.as_strided(buffer, t.shape, t.stride(), margin)
    copy_values(view, t)
    return view


def copy_values(target: torch.Tensor, source: torch.Tensor) -> None:
    """Write `source`'s values to `target`, of the same sizes and strides: once each where a dimension is expanded."""
    if target.numel() > 0:
        once = tuple(slice(0, 1) if s == 0 else slice(None) for s in target.stride())
        target[once].copy_(source[once])


def _canary(dtype: torch.dtype):
    if dtype == torch.bool:
        return True
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min


def canaries_intact(view: torch.Tensor) -> bool:
    """Whether no element outside `view` has changed in the buffer that `with_canaries` made for it."""
    if view.numel() == 0:
        return True
    whole = torch.as_strided(view, (view.untyped_storage().nbytes() // view.element_size(),), (1,), 0).clone()
    offset = view.storage_offset()
    torch.as_strided(whole, view.shape, view.stride(), offset).fill_(_canary(view.dtype))
    expected = torch.full_like(whole, _canary(view.dtype))
    return torch.equal(comparable(whole), comparable(expected))


# ---------------------------------------------------------------------------------------------------- an op against its spec


def clone_sample(sample: Sample, device: torch.device | None = None) -> Sample:
    """A copy whose tensors share no memory with the original's and keep its strides; on `device`, by default its own."""
    return sample.map_tensors(lambda t: with_canaries(t, device=device))


def outputs_of(spec: OpSpec, fn: Callable, sample: Sample) -> dict[str, torch.Tensor]:
    """Call `fn` and name all it produced: `return 0` ..., and every argument the schema says it wrote."""
    returned = fn(*sample.args, **sample.kwargs)
    values: Sequence[Any] = returned if isinstance(returned, (tuple, list)) else () if returned is None else (returned,)
    named = {f"return {i}": value for i, value in enumerate(values)}
    bound = spec.bind(sample)
    named.update({name: bound[name] for name in spec.mutated})
    return named


def upcast(t: torch.Tensor) -> torch.Tensor:
    return t.double() if t.dtype.is_floating_point else t


def assert_op_matches_reference(spec: OpSpec, sample: Sample, fn: Callable | None = None) -> None:
    """Run the op (or `fn` in its place) on `sample` and hold everything it produced and left alone against the spec.

    The kernel runs first, before the reference has put the right answer into reusable memory. Checked: every output by the
    error budget (bit for bit where the spec says exact), canaries around every tensor, inputs that the schema doesn't
    name as written are unchanged.
    """
    mine = clone_sample(sample)
    actual = outputs_of(spec, fn or spec.overload, mine)
    where = f"fi::{spec.name} [{sample.name}]"
    bound, original = spec.bind(mine), spec.bind(sample)
    for name, value in bound.items():
        if isinstance(value, torch.Tensor):
            assert canaries_intact(value), f"{where}: wrote outside {name}"
            if name not in spec.mutated:
                assert torch.equal(comparable(value), comparable(original[name])), (
                    f"{where}: changed {name}, which it must not"
                )

    same = outputs_of(spec, spec.reference, clone_sample(sample))
    exact = same if spec.exact else outputs_of(spec, spec.reference, clone_sample(sample).map_tensors(upcast))
    assert actual.keys() == same.keys(), f"{where}: produced {list(actual)}, the reference {list(same)}"
    for name, value in actual.items():
        assert value.dtype == same[name].dtype, (
            f"{where}: {name} is {value.dtype}, the reference's is {same[name].dtype}"
        )
        if spec.exact or not value.dtype.is_floating_point:
            assert value.shape == same[name].shape, f"{where}: {name} has shape {list(value.shape)}"
            wrong = (value != same[name]).nonzero()
            assert len(wrong) == 0, (
                f"{where}: {name} differs from the reference at {len(wrong)} places, first at {wrong[0].tolist()}: "
                f"got {value[tuple(wrong[0])]}, expected {same[name][tuple(wrong[0])]}"
            )
        else:
            assert_within_budget(value, exact[name], same[name], f"{where}: {name}")
