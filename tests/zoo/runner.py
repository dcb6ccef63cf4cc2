"""Run one case of the zoo: compile prefill and decode with the rewrites, compare with eager, say what was rewritten.

Everything is compiled up to code generation and the graph then runs as it is, with the real kernels of fi ops; logits are
judged by the package's error budget against the same model in float64.
"""

from __future__ import annotations

import itertools
import types
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from inductor_capture import Capture, compiled_for_capture
from torch.overrides import TorchFunctionMode

from fi_ops.testing import deviation

from .families import BY_KEY, COMMON, Family

BATCH, PROMPT, STEPS, CACHE_LEN, PADDING = 2, 6, 4, 24, 2
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Case:
    family: str
    implementation: str = "sdpa"
    cache: str = "static"
    """static or dynamic; encoders have "none"."""
    dtype: torch.dtype = torch.float32
    dynamic: bool | None = None
    padded: bool = False
    """The first prompt of the batch is shorter, and padded on its left."""

    @property
    def key(self) -> str:
        words = [self.family, self.implementation, self.cache]
        words += [str(self.dtype).removeprefix("torch.")] if self.dtype != torch.float32 else []
        return " ".join(words + ["dynamic-shapes"] * bool(self.dynamic) + ["padded"] * self.padded)


@dataclass
class Phase:
    """What became of prefill or of decode."""

    sites: int
    """Attentions that the model computes."""
    graphs: list[Counter] = field(default_factory=list)
    """For each compiled graph: how many sites reached which grade ("" is left alone)."""
    reasons: list[str] = field(default_factory=list)
    error: float = 0.0
    """The largest error of a logit as a fraction of its budget."""

    def record(self) -> dict[str, Any]:
        """What `golden.jsonl` says: each different graph once, in the order they were compiled."""
        rewritten = min((sum(n for grade, n in g.items() if grade) for g in self.graphs), default=0)
        grades = list(dict.fromkeys(g for graph in self.graphs for g in sorted(graph, reverse=True) if g))
        graphs = list(dict.fromkeys(_graph_text(graph, self.sites) for graph in self.graphs))
        error = round(self.error, 2)
        return {"sites": self.sites, "rewritten": rewritten, "grades": grades, "graphs": graphs, "error": error}


def _graph_text(grades: Counter, sites: int) -> str:
    found = sum(grades.values())
    words = [f"{n} {grade}" for grade, n in sorted(grades.items(), reverse=True) if grade]
    words += [f"{grades['']} left alone"] if grades[""] else []
    words += [f"{sites - found} not found"] if found < sites else []
    return ", ".join(words)


@dataclass
class Outcome:
    case: Case
    phases: dict[str, Phase]
    compiles: int = 0
    """Graphs compiled in all."""
    stock_compiles: int | None = None

    def record(self) -> dict[str, Any]:
        """A line of `golden.jsonl`."""
        phases = {name: phase.record() for name, phase in self.phases.items() if phase.sites}
        return {"case": self.case.key, **phases, "compiles": self.compiles, "stock_compiles": self.stock_compiles}


class InDouble(TorchFunctionMode):
    """What a model does in float32 for precision (softmax, norms, RoPE) happens in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        swap = {torch.float32: torch.float64}
        args = tuple(swap.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {k: swap.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


def build(family: Family, implementation: str, dtype: torch.dtype, compiled: bool = True) -> torch.nn.Module:
    config_class = getattr(transformers, family.config_class or f"{family.name}Config")
    config = config_class(**COMMON | family.config)
    if not compiled and "num_experts_per_tok" in family.config:  # their usual grouped product is not for float64
        config._experts_implementation = "eager"
    config._attn_implementation = {"flex": "flex_attention"}.get(implementation, implementation)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family.name}{family.head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start as ones and zeros, which hide mistakes
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.to(dtype)


def _new_cache(model, kind: str):
    config = model.config
    if kind == "static":
        cache = transformers.StaticCache(config=config, max_cache_len=CACHE_LEN)
    else:
        cache = transformers.DynamicCache(config=config)
    if not config.is_encoder_decoder:
        return cache
    if kind == "static":
        cross = transformers.StaticCache(config=config, max_cache_len=getattr(config, "max_source_positions", PROMPT))
    else:
        cross = transformers.DynamicCache(config=config)
    return transformers.EncoderDecoderCache(cache, cross)


def _inputs(family: Family, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """(what prefill gets, the token of each decode step); the same for every run of a family."""
    generator = torch.Generator().manual_seed(1)

    def ids(length):
        return torch.randint(3, COMMON["vocab_size"], (BATCH, length), generator=generator)

    if family.inputs == "pixels":
        size = family.config["image_size"]
        return {"pixel_values": torch.randn(BATCH, 3, size, size, generator=generator).to(dtype)}, []
    if family.inputs == "features":
        shape = (BATCH, family.config["num_mel_bins"], 2 * family.config["max_source_positions"])
        first = {"input_features": torch.randn(shape, generator=generator).to(dtype)}
    else:
        first = {"input_ids": ids(PROMPT)}
    if family.kind == "encoder-decoder":
        first["decoder_input_ids"] = ids(PROMPT)
    return first, [ids(1) for _ in range(STEPS)] if family.kind != "encoder" else []


def _keep(length: int) -> torch.Tensor:
    """The tokens that are no padding."""
    keep = torch.ones(BATCH, length, dtype=torch.long)
    keep[0, :PADDING] = 0
    return keep


def generate(model, family: Family, case: Case, prefill: Callable, decode: Callable) -> list[torch.Tensor]:
    """Logits of a prompt and of some decode steps with given tokens. `model` fills the static caches a first time."""
    first, tokens = _inputs(family, next(model.parameters()).dtype)
    first_row = PADDING if case.padded else 0  # what comes out of padding means nothing
    with torch.no_grad():
        if case.padded:
            first["attention_mask"] = _keep(PROMPT)
        if family.kind == "encoder":
            return [prefill(**first)[0][:, first_row:]]
        cache = _new_cache(model, case.cache)
        if case.cache == "static":  # a second prompt: the cache is there already and is written in place
            model(**first, past_key_values=cache)
            cache.reset()
        extra = {"position_ids": torch.arange(PROMPT).expand(BATCH, -1)} if family.positions else {}
        output = prefill(**first, **extra, past_key_values=cache)
        logits = [output.logits[:, first_row:]]
        for step, token in enumerate(tokens):
            if family.positions:
                extra["position_ids"] = torch.full((BATCH, 1), PROMPT + step)
            if case.padded:
                extra["attention_mask"] = _keep(PROMPT + 1 + step)
            if family.kind == "encoder-decoder":
                encoded = {"encoder_outputs": (output.encoder_last_hidden_state,), "decoder_input_ids": token}
                logits.append(decode(**encoded, past_key_values=cache).logits)
            else:
                logits.append(decode(token, **extra, past_key_values=cache).logits)
        return logits


_serial = itertools.count()


def _with_own_code(model) -> Callable:
    """A function that calls the model, with a code object of its own: dynamo counts its compiles apart."""

    def call(*args, **kwargs):
        return model(*args, **kwargs)

    code = call.__code__.replace(co_name=f"zoo_{next(_serial)}")
    return types.FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)


def _compiled_run(eager, family: Family, case: Case, compile: Callable[[str], Callable]) -> list[torch.Tensor]:
    """The logits of a run with the forward that `compile` makes for each phase."""
    torch._dynamo.reset()
    # Transformers makes block masks in a way that warns, at which stock torch breaks the graph.
    with torch._dynamo.config.patch(ignore_logging_functions={warnings.warn}):
        return generate(eager, family, case, *(compile(phase) for phase in PHASES))


def _run_captured(model, eager, family: Family, case: Case, rewritten: bool) -> tuple[list, dict[str, Capture]]:
    captures = {phase: Capture() for phase in PHASES}

    def compile(phase: str) -> Callable:
        options = dict(rewritten=rewritten, dynamic=case.dynamic)
        return compiled_for_capture(_with_own_code(model), captures[phase], **options)

    return _compiled_run(eager, family, case, compile), captures


def _stock_compiles(model, eager, family: Family, case: Case, ours: int) -> int:
    """How many graphs stock torch compiles. Dynamo alone compiles no more than that, and is asked first, because it is fast."""
    graphs = []

    def backend(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module.forward

    def compile(phase: str) -> Callable:
        return torch.compile(_with_own_code(model), backend=backend, fullgraph=True, dynamic=case.dynamic)

    _compiled_run(eager, family, case, compile)
    if len(graphs) == ours:
        return ours
    _, captures = _run_captured(model, eager, family, case, rewritten=False)
    return sum(len(capture.graphs) for capture in captures.values())


def run(case: Case, against_stock: bool = False) -> Outcome:
    """Compile and run one case. `against_stock` also counts the graphs that stock torch compiles."""
    family = BY_KEY[case.family]
    model = build(family, case.implementation, case.dtype)
    precise = build(family, "eager", case.dtype, compiled=False).double()
    # FlexAttention in eager mode is compiled too, and takes its time.
    eager = build(family, "eager", case.dtype) if case.implementation == "flex" else model
    ours, captures = _run_captured(model, eager, family, case, rewritten=True)
    same_dtypes = generate(eager, family, case, eager, eager)
    with InDouble():
        exact = generate(precise, family, case, precise, precise)
    outcome = Outcome(case, {"prefill": Phase(family.prefill_sites), "decode": Phase(family.decode_sites)})
    for phase, steps in (("prefill", slice(0, 1)), ("decode", slice(1, None))):
        if ours[steps]:
            # One budget for all steps: in a single one, eager may happen to err by next to nothing.
            result = deviation(*(torch.cat(logits[steps], dim=1) for logits in (ours, exact, same_dtypes)))
            outcome.phases[phase].error = result.error / result.limit
    for name, capture in captures.items():
        phase = outcome.phases[name]
        outcome.compiles += len(capture.graphs)
        for report in capture.reports:
            phase.graphs.append(Counter(site.grade for site in report.sites if site.kind == "attention"))
            phase.reasons += [s.reason for s in report.sites if s.kind == "attention" and s.reason]
        phase.graphs += [Counter() for _ in range(len(capture.graphs) - len(capture.reports))]
    if against_stock:
        outcome.stock_compiles = _stock_compiles(model, eager, family, case, outcome.compiles)
    return outcome


def cases(family: Family) -> list[Case]:
    """The table's cases: every implementation and cache that the family has; one of them in bf16, in dynamic shapes, padded."""
    plain = [Case(family.key, impl, cache) for impl in family.implementations for cache in family.caches]
    # transformers' block mask of a static cache reads the cache's length after it has advanced: wrong in stock torch too.
    plain = [case for case in plain if (case.implementation, case.cache) != ("flex", "static")]
    first = plain[0]
    varied = [replace(first, dtype=torch.bfloat16), replace(first, dynamic=True)]
    if family.kind != "encoder-decoder" and family.inputs == "ids":
        varied.append(replace(first, cache=family.caches[-1], padded=True))
    return [*plain, *varied]


VARIED = ("Llama", "Gemma3", "GPTJ", "GptOss", "Bloom", "T5")
"""Families of which CI runs every case."""


def quick_cases(family: Family) -> list[Case]:
    """Those of CI: every cache with one implementation and every implementation with one cache."""
    if family.key in VARIED:
        return cases(family)
    plain = [case for case in cases(family) if case == Case(case.family, case.implementation, case.cache)]
    first = plain[0]
    return [case for case in plain if first.cache == case.cache or first.implementation == case.implementation]
