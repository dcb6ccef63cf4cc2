"""Pipelines from logits (or probabilities) to tokens, with FlashInfer's names (`flashinfer.logits_processor`).

    pipe = LogitsPipe([Temperature(), Softmax(), TopK(), TopP(), Sample()])
    tokens = pipe(logits, temperature=0.8, top_k=50, top_p=0.9)

What the processors mean in their order is one distribution, so a pipe compiles into one op, whatever it is made of:
nothing between is written out. The filters keep what they keep in `fi_ops.sampling`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import torch

from . import sampling
from ._arguments import array_or_number

__all__ = ["LogitsPipe", "LogitsProcessor", "MinP", "Sample", "Softmax", "Temperature", "TensorType", "TopK", "TopP"]


class TensorType(enum.Enum):
    """What a tensor in a pipe is."""

    LOGITS = "logits"
    PROBS = "probs"
    INDICES = "indices"


class LogitsProcessor:
    """One step of a pipe. Keyword arguments of a processor are defaults for those of the pipe's call."""

    takes: tuple[TensorType, ...] = (TensorType.LOGITS, TensorType.PROBS)
    gives: TensorType | None = None
    """None: what it takes."""
    parameter: str | None = None
    """The call's argument that it must get."""
    options: tuple[str, ...] = ()
    """Arguments of the call that it may get."""

    def __init__(self, **params: Any):
        known = (*self.options, *((self.parameter,) if self.parameter else ()))
        unknown = set(params) - set(known)
        if unknown:
            raise TypeError(
                f"fi_ops.{type(self).__name__}: {', '.join(sorted(unknown))} must be one of its arguments "
                f"({', '.join(known) or 'none'}); leave it out"
            )
        self.params = params

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in self.params.items())})"


class Temperature(LogitsProcessor):
    """Divides logits by `temperature`, a number or float32 `[batch]`; 0 is argmax where a Softmax or Sample follows."""

    takes = (TensorType.LOGITS,)
    parameter = "temperature"


class Softmax(LogitsProcessor):
    """Logits to probabilities."""

    takes = (TensorType.LOGITS,)
    gives = TensorType.PROBS


class TopK(LogitsProcessor):
    """Keeps the `top_k` largest, an int or an integer tensor `[batch]`: others become -inf, or 0 and the rest normalised.

    joint_topk_topp: a TopP right behind it measures the mass of the whole row, not of what top-k left.
    ties: "exact" keeps k tokens, lowest ids first; "threshold" all that equal the k-th.
    """

    parameter = "top_k"

    def __init__(self, joint_topk_topp: bool = False, ties: str = "exact", **params: Any):
        super().__init__(**params)
        self.joint_topk_topp = joint_topk_topp
        self.ties = ties


class TopP(LogitsProcessor):
    """Keeps the smallest set of largest tokens whose mass reaches `top_p`, a number or float32 `[batch]`."""

    takes = (TensorType.PROBS,)
    parameter = "top_p"


class MinP(LogitsProcessor):
    """Keeps tokens of at least `min_p`, a number or float32 `[batch]`, times the largest probability."""

    takes = (TensorType.PROBS,)
    parameter = "min_p"


class Sample(LogitsProcessor):
    """Draws a token; nothing can follow. `deterministic` is accepted and without effect: it always is."""

    gives = TensorType.INDICES
    options = ("indices", "generator", "seed", "offset", "uniform", "check_nan", "return_valid")

    def __init__(self, deterministic: bool = True, **params: Any):
        super().__init__(**params)


_STEPS = (Temperature, Softmax, TopK, TopP, MinP, Sample)


class LogitsPipe:
    """A sequence of processors as one function of logits or probabilities.

    Args:
        processors: in the order in which they apply, each at most once.
        compile: into one op; else one op a processor (the same result up to the rounding of what is between).
        input_type: `TensorType.LOGITS` or `PROBS`; None: what the first processor takes, logits where it takes both and
            a Softmax, Temperature or nothing but Sample comes with it.

    Raises:
        ValueError: the processors don't fit together.

    Calling it: `pipe(x, temperature=..., top_k=..., top_p=..., min_p=...)` with an argument for each processor that has
    no default of its own, and those of `Sample`: `indices`, `generator`, `seed`, `offset`, `uniform`, `check_nan`,
    `return_valid` as in `fi_ops.sampling`. TypeError for one that is missing or that no processor takes.

    Source: FlashInfer `LogitsPipe` (custom fusion rules and processors of one's own are not there).
    """

    def __init__(self, processors: list[LogitsProcessor], compile: bool = True, input_type: TensorType | None = None):
        self.processors = list(processors)
        self._types = _check(self.processors, input_type)
        self._run: Callable[[torch.Tensor, dict], Any] = self._compiled if compile else self._one_by_one

    @property
    def initial_type(self) -> TensorType:
        """What the pipe takes."""
        return self._types[0]

    def __repr__(self) -> str:
        return f"LogitsPipe([{' -> '.join(type(p).__name__ for p in self.processors)}])"

    def __call__(self, x: torch.Tensor, **kwargs: Any) -> Any:
        arguments = {name: value for p in self.processors for name, value in p.params.items()} | kwargs
        needed = [p.parameter for p in self.processors if p.parameter]
        known = {*needed, *(name for p in self.processors for name in p.options)}
        for name in needed:
            if arguments.get(name) is None:
                raise TypeError(
                    f"fi_ops.LogitsPipe: {name} must be given, got none; pass it to the call or its processor"
                )
        for name in arguments:
            if name not in known:
                raise TypeError(
                    f"fi_ops.LogitsPipe: {name} must have a processor that takes it, got none; add one or drop it"
                )
        return self._run(x, arguments)

    # ------------------------------------------------------------------------------------------------ one op

    def _compiled(self, x: torch.Tensor, arguments: dict):
        filters = _filters(self.processors, arguments)
        result = self._types[-1]
        if result is TensorType.INDICES:
            return _sample(x, self.initial_type, filters, arguments)
        if result is TensorType.PROBS:
            return _probs(x, self.initial_type, filters)
        if "top_k" in filters:
            x = sampling.top_k_mask_logits(x, filters["top_k"], ties=filters["top_k_ties"])
        return _divide(x, filters["temperature"]) if "temperature" in filters else x

    # ------------------------------------------------------------------------------------------------ one op a step

    def _one_by_one(self, x: torch.Tensor, arguments: dict):
        steps: list[LogitsProcessor] = []
        for processor, behind, kind in zip(self.processors, [*self.processors[1:], None], self._types, strict=False):
            steps = [*steps, processor]
            if _is_joint(processor, behind):
                continue
            filters = _filters(steps, arguments)
            if isinstance(processor, Sample):
                x = _sample(x, kind, filters, arguments)
            elif isinstance(processor, Temperature):
                x = _divide(x, filters["temperature"])
            elif isinstance(processor, TopK) and kind is TensorType.LOGITS:
                x = sampling.top_k_mask_logits(x, filters["top_k"], ties=filters["top_k_ties"])
            else:
                x = _probs(x, kind, filters)
            steps = []
        return x


def _check(processors: list[LogitsProcessor], input_type: TensorType | None) -> list[TensorType]:
    """What each processor takes, and what the pipe gives at the end."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"fi_ops.LogitsPipe: {message}")

    require(bool(processors), "processors must be one or more, got none; pass a list such as [Softmax(), Sample()]")
    names = [type(p).__name__ for p in processors]
    for p in processors:
        require(isinstance(p, _STEPS), f"processors must be of this module, got {type(p).__name__}; pass one of its")
        require(names.count(type(p).__name__) == 1, f"{type(p).__name__} must come once, got it more often; drop one")
    kind = input_type
    if kind is None:
        first = processors[0].takes
        from_logits = any(isinstance(p, (Temperature, Softmax)) for p in processors)
        require(
            len(first) == 1 or from_logits,
            f"input_type must be given where {names[0]} comes first, got None; pass TensorType.LOGITS or PROBS",
        )
        kind = TensorType.LOGITS if from_logits else first[0]
    types = [kind]
    for p in processors:
        require(
            kind in p.takes,
            f"{type(p).__name__} must get {' or '.join(t.value for t in p.takes)}, got {kind.value}; reorder the processors",
        )
        kind = p.gives or kind
        types.append(kind)
    return types


def _filters(processors: list[LogitsProcessor], arguments: dict) -> dict:
    """The filters of the processors by the names of the ops' arguments, and the order that theirs amounts to.

    Every filter keeps a prefix in one order, so what they keep together is the shortest: their order matters only to the
    mass of which top-p is a part.
    """
    filters: dict[str, Any] = {}
    for before, p in zip([None, *processors], processors, strict=False):
        if isinstance(p, TopP):
            filters["top_k_first"] = "top_k" in filters and not _is_joint(before, p)
            filters["min_p_first"] = "min_p" in filters
        if isinstance(p, TopK):
            filters["top_k_ties"] = p.ties
        if p.parameter is not None:
            filters[p.parameter] = arguments[p.parameter]
    return filters


def _is_joint(before: LogitsProcessor | None, p: LogitsProcessor | None) -> bool:
    return isinstance(before, TopK) and before.joint_topk_topp and isinstance(p, TopP)


def _rows_op(name: str, x: torch.Tensor, filters: dict) -> torch.Tensor:
    arguments: dict[str, Any] = {}
    for key, value in filters.items():
        if key in ("top_k", "top_p", "min_p", "temperature"):
            arguments[f"{key}_arr"], arguments[key] = array_or_number(value, 0 if key in ("top_k", "min_p") else 1.0)
        else:
            arguments[key] = value
    return getattr(torch.ops.fi, name)(x, **arguments)


def _probs(x: torch.Tensor, kind: TensorType, filters: dict) -> torch.Tensor:
    if kind is TensorType.PROBS:
        return _rows_op("top_k_top_p_renorm_probs", x, filters) if filters else x
    return _rows_op("top_k_top_p_softmax" if filters.keys() - {"temperature"} else "softmax", x, filters)


def _sample(x: torch.Tensor, kind: TensorType, filters: dict, arguments: dict):
    draw = {name: arguments[name] for name in Sample.options if name in arguments}
    if not filters:
        return (sampling.sampling_from_probs if kind is TensorType.PROBS else sampling.sampling_from_logits)(x, **draw)
    order = "top_k_first" if filters.get("top_k_first", True) else "joint"
    options = {key: filters[key] for key in ("min_p", "min_p_first", "temperature") if key in filters}
    options["ties"] = filters.get("top_k_ties", "exact")
    function = (
        sampling.top_k_top_p_sampling_from_probs
        if kind is TensorType.PROBS
        else sampling.top_k_top_p_sampling_from_logits
    )
    top_k, top_p = filters.get("top_k", 0), filters.get("top_p", 1.0)
    return function(x, top_k, top_p, filter_apply_order=order, **options, **draw)


def _divide(logits: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
    return logits / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
