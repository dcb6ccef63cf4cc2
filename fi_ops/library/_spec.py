"""One spec an op: schema, reference, fake, samples, errors, cost; and the registry that everything enumerates.

Tests, benches, the README's support matrix and `torch.ops.fi` itself come from `SPECS`; nobody lists ops a second time.
To add an op: decorate its reference with `@op(...)` in a file of this folder and bind a kernel in `csrc/`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from .._load import make_stub
from ._checks import check_no_grad

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
INDEX_TYPES = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Sample:
    """One call of an op. `name` says what it is there for; tensors are on the device and of the dtype asked for."""

    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    def map_tensors(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> Sample:
        def one(value):
            return fn(value) if isinstance(value, torch.Tensor) else value

        return Sample(tuple(map(one, self.args)), {k: one(v) for k, v in self.kwargs.items()}, self.name)


@dataclass(frozen=True)
class ErrorSample:
    """A call that must be refused with a message that matches `match`.

    `needs_values`: the fault is in tensor data, so only the kernel sees it, not a fake tensor.
    """

    args: tuple
    match: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    needs_values: bool = False


@dataclass(frozen=True)
class Cost:
    """What a call must move and compute at the least: bytes read once and written once, floating-point operations."""

    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class OpSpec:
    name: str
    schema: str
    reference: Callable
    """Plain torch, right in any dtype (fp64 included); does to its arguments what the op does to them."""
    fake: Callable
    """Checks metadata and returns empty outputs."""
    samples: Callable[[torch.device, torch.dtype], Iterable[Sample]]
    errors: Callable[[torch.device], Iterable[ErrorSample]]
    cost: Callable[..., Cost]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    exact: bool = False
    """Outputs are compared bit for bit (integers, copies) instead of by the error budget."""
    family: str = ""

    @functools.cached_property
    def parsed(self) -> torch.FunctionSchema:
        return torch._C.parse_schema(f"fi::{self.name}{self.schema}")

    @property
    def overload(self):
        return getattr(torch.ops.fi, self.name).default

    @property
    def mutated(self) -> tuple[str, ...]:
        """Names of the arguments that the op writes."""
        return tuple(a.name for a in self.parsed.arguments if a.alias_info is not None and a.alias_info.is_write)

    @property
    def doc(self) -> str:
        return (self.reference.__doc__ or "").strip()

    def bind(self, sample: Sample) -> dict[str, Any]:
        """The sample's arguments by name, defaults filled in."""
        names = [a.name for a in self.parsed.arguments]
        bound = {a.name: a.default_value for a in self.parsed.arguments if a.has_default_value()}
        bound.update(zip(names, sample.args, strict=False))
        bound.update(sample.kwargs)
        return bound


SPECS: dict[str, OpSpec] = {}
_library = torch.library.Library("fi", "DEF")
_stubs = torch.library.Library("fi", "IMPL", "CompositeExplicitAutograd")


def op(schema: str, *, fake: Callable, samples: Callable, errors: Callable, cost: Callable, **options) -> Callable:
    """Register the decorated reference as op `fi::<function name>` with `schema` (arguments and returns only)."""

    def decorate(reference: Callable) -> Callable:
        name = reference.__name__
        family = reference.__module__.rsplit(".", 1)[-1]
        spec = OpSpec(name, schema, reference, fake, samples, errors, cost, family=family, **options)
        SPECS[name] = spec
        _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _stubs.impl(name, make_stub(name))

        @functools.wraps(fake)
        def checked_fake(*args, **kwargs):
            check_no_grad(name, args, kwargs)
            return fake(*args, **kwargs)

        torch.library.register_fake(f"fi::{name}", checked_fake, lib=_library)
        return reference

    return decorate


def schema_text() -> str:
    """All schemas as one text: part of the key of everything that is cached about compiled graphs."""
    return "\n".join(f"{name}{SPECS[name].schema}" for name in sorted(SPECS))
