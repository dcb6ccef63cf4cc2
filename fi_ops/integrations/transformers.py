"""Hugging Face `generate` sampling through fi_ops: it samples in eager code, outside the graph that the rewrites see.

    from fi_ops.integrations import transformers as fi_transformers

    fi_transformers.install(model)              # until uninstall(model); or: with fi_transformers.installed(model): ...
    model.generate(ids, do_sample=True, temperature=0.8, top_k=50, top_p=0.9, generator=generator)

`generate` itself does all it does otherwise: it prepares the logits processors in its order, and its own decoding loop runs.
What changes is the step from scores to token: the last processors, as far as they are temperature, top-k, top-p and min-p in
this order, are not applied but become arguments of one op that draws the token (`top_k_top_p_sampling_from_logits`), one
random number a row. Processors in front of them (penalties, bans, grammars, your own) run as they are, and so do those that
the op does not have (typical_p, epsilon and eta cutoffs, top_h, watermarks): then the op draws from what they leave.

How it gets in: `custom_generate`, the argument with which `generate` takes a decoding loop; `sample` is one, which calls
the model's own. `install` puts a `generate` on that one model which passes it. No class or module is patched.

Same distribution, other random numbers: a seed gives other tokens than without. Of tokens with the very same score at
the edge of top-p, the lowest ids are kept here, the highest ones there.
"""

# Hugging Face's classes have no types where it is not installed, and protocols of its own where it is.
# mypy: disable-error-code="arg-type,method-assign,misc,no-any-return"

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

try:
    import transformers
    from transformers.generation import (
        GenerationConfig,
        GenerationMixin,
        GenerationMode,
        LogitNormalization,
        LogitsProcessorList,
        MinPLogitsWarper,
        StoppingCriteriaList,
        StopStringCriteria,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )
    from transformers.generation.streamers import BaseStreamer
except ImportError as error:
    raise ImportError(
        "fi_ops.integrations.transformers needs Hugging Face transformers 5.0 or newer; pip install 'transformers>=5'"
    ) from error
if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(
        f"fi_ops.integrations.transformers needs transformers 5.0 or newer, got {transformers.__version__}; "
        "pip install 'transformers>=5'"
    )

from .. import sampling
from .._load import available
from ..library import SPECS

__all__ = ["DrawingProcessors", "install", "installed", "sample", "uninstall"]

_NAME = "fi_ops.integrations.transformers"
_SPEC = SPECS["top_k_top_p_sampling_from_logits"]


# ------------------------------------------------------------------------------------------------ on a model


def install(model: GenerationMixin) -> None:
    """Let `model.generate(do_sample=True)` sample through fi_ops, until `uninstall(model)`.

    `generate` takes all its arguments as before, and `generator=`, a `torch.Generator` on the device of the input ids for the
    random numbers (default: torch's own generator there, so `torch.manual_seed` repeats them). Calls that don't sample
    (greedy search) are as before. Those that sample in another way than token by token from the scores (beams, assisted
    generation, continuous batching, several processes in step), or want the scores themselves (`output_scores=True`), are
    left to Hugging Face, with a warning that says why.

    Raises:
        TypeError: model has no `generate`, or its class has one of its own: then it is the model inside that samples.
        RuntimeError: `model.generate` has been replaced by something else.
    """
    model = _uncompiled(model)
    if not isinstance(model, GenerationMixin):
        raise TypeError(
            f"{_NAME}: model must be one with generate(), got {type(model).__name__}; pass a "
            "transformers model such as AutoModelForCausalLM loads"
        )
    if type(model).generate is not GenerationMixin.generate:
        raise TypeError(
            f"{_NAME}: model must sample by transformers' own generate(), but "
            f"{type(model).__name__} has one of its own; pass the language model inside it"
        )
    replaced = vars(model).get("generate")
    if replaced is not None and not _is_ours(replaced):
        raise RuntimeError(
            f"{_NAME}: model.generate must be its class's, got {replaced!r} on the model itself; "
            "delete it first, or pass custom_generate=fi_ops.integrations.transformers.sample to generate()"
        )
    model.generate = functools.partial(_generate, model)


def uninstall(model: GenerationMixin) -> None:
    """Undo `install(model)`; nothing happens where it was not done."""
    model = _uncompiled(model)
    if _is_ours(vars(model).get("generate")):
        del model.generate


@contextlib.contextmanager
def installed(model: GenerationMixin) -> Iterator[None]:
    """`with installed(model):` what `install(model)` does, inside."""
    was = _is_ours(vars(_uncompiled(model)).get("generate"))
    install(model)
    try:
        yield
    finally:
        if not was:
            uninstall(model)


def _uncompiled(model: Any) -> Any:
    """The model behind `torch.compile(model)`, whose `generate` it is."""
    return getattr(model, "_orig_mod", model)


def _is_ours(generate: object) -> bool:
    return isinstance(generate, functools.partial) and generate.func is _generate


def _generate(model: GenerationMixin, *args: Any, generator: torch.Generator | None = None, **kwargs: Any) -> Any:
    """`generate` of a model with `install`."""
    theirs = functools.partial(type(model).generate, model)
    given = inspect.signature(theirs).bind(*args, **kwargs).arguments
    settings = given.pop("kwargs", {})
    config = _resolved(model, given.get("generation_config"), settings)
    if config.do_sample is not True:
        if generator is not None:
            raise ValueError(f"{_NAME}: generator must come with do_sample=True, got {config.do_sample}; leave one out")
        return theirs(*args, **kwargs)
    reason = _not_ours(config, given, settings)
    if reason:
        if generator is not None:
            raise ValueError(f"{_NAME}: generator must come alone, got {reason} with it; leave one of them out")
        _warn(reason)
        return theirs(*args, **kwargs)
    # What `generate` hands to its own decoding loops only, not to a custom one.
    tokenizer = settings.pop("tokenizer", None)
    if config.stop_strings is not None and tokenizer is not None:
        stop = StopStringCriteria(tokenizer, config.stop_strings)
        given["stopping_criteria"] = StoppingCriteriaList([*(given.get("stopping_criteria") or []), stop])
        settings["stop_strings"] = None
    loop = functools.partial(sample, generator=generator, token_streamer=given.get("streamer"))
    return theirs(**given, **settings, custom_generate=loop)


@functools.cache
def _warn(reason: str) -> None:
    """Once for each reason."""
    warnings.warn(f"{_NAME}: generate() samples as it does without fi_ops: it got {reason}", stacklevel=3)


def _resolved(model: GenerationMixin, config: GenerationConfig | None, settings: dict) -> GenerationConfig:
    """The settings that `generate` goes by: its arguments, else those of generation_config, else the model's own."""
    result = copy.copy(config) if config is not None else GenerationConfig()
    for name, value in vars(model.generation_config).items():
        if getattr(result, name, None) is None:
            setattr(result, name, value)
    for name, value in settings.items():
        if hasattr(result, name):
            setattr(result, name, value)
    return result


def _not_ours(config: GenerationConfig, given: dict, settings: dict) -> str:
    """What is in the way of drawing the tokens here; empty if nothing is."""
    if given.get("custom_generate") is not None:
        return "custom_generate"
    if settings.get("cache_implementation") == "paged":
        return "cache_implementation='paged' (continuous batching)"
    mode = config.get_generation_mode(given.get("assistant_model"))
    if mode != GenerationMode.SAMPLE:
        return f"arguments that ask for {mode.value.replace('_', ' ')}"
    if _wants_scores(config):
        return "output_scores=True, and the filtered scores are not made here"
    if given.get("synced_gpus") or (given.get("synced_gpus") is None and _is_one_of_several()):
        return "synced_gpus=True, or several processes and not synced_gpus=False"
    return ""


def _wants_scores(config: GenerationConfig) -> bool:
    return bool(config.return_dict_in_generate and config.output_scores)


def _is_one_of_several() -> bool:
    """`generate` may have to keep in step with other processes, as it finds out by itself."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


# ------------------------------------------------------------------------------------------------ one decoding loop


def sample(
    model: GenerationMixin,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    generator: torch.Generator | None = None,
    token_streamer: BaseStreamer | None = None,
    **kwargs: Any,
) -> Any:
    """A decoding loop for one call: `model.generate(ids, do_sample=True, custom_generate=sample, generator=generator)`.

    It is the model's own loop with another draw. `generate` hands neither `streamer` nor the tokenizer of `stop_strings` to a
    loop that it is given; with `install` or `installed` both work.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, kwargs: as `generate` prepares them.
        generator: where the random numbers come from, on the device of input_ids; None: torch's default generator.
        token_streamer: gets each step's tokens (`streamer`, under a name that `generate` passes on).

    Raises:
        ValueError: the call asks for beams, assisted generation or scores.
        RuntimeError: a row of the scores has NaN, or no token that can be drawn (on CUDA asynchronously, as in torch).

    Returns what `generate` does.
    """
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH) or _wants_scores(generation_config):
        found = "output_scores=True" if _wants_scores(generation_config) else mode.value.replace("_", " ")
        raise ValueError(
            f"{_NAME}: custom_generate=sample must come with plain sampling, got {found}; leave it out there"
        )
    if generation_config.do_sample:
        logits_processor = DrawingProcessors(logits_processor, generator)
    kwargs.setdefault("streamer", token_streamer)
    return type(model)._sample(
        model,
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        **kwargs,
    )


class DrawingProcessors(LogitsProcessorList):
    """The processors of `generate`, of which the last become arguments of the op that draws.

    Called with input_ids and scores `[batch, vocab_size]` (float32, bfloat16, float16), it gives scores which leave one token
    a row: softmax and multinomial, or argmax, of them pick the token that was drawn.

    Args:
        processors: in the order in which they apply.
        generator: see `sample`.
    """

    def __init__(self, processors: list, generator: torch.Generator | None = None):
        super().__init__(processors)
        first, self.filters = _filters_at_the_end(processors)
        self.before, self.behind = (LogitsProcessorList(part) for part in (processors[:first], processors[first:]))
        self.generator = generator

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
        scores = self.before(input_ids, scores, **kwargs)
        if scores.dim() != 2 or scores.dtype not in _SPEC.dtypes or not available(scores.device.type):
            found = f"scores {list(scores.shape)} of {scores.dtype} on {scores.device}"
            if self.generator is not None:
                raise ValueError(
                    f"{_NAME}: generator must come with scores that the op takes, got {found}; leave it out"
                )
            _warn(found)
            return self.behind(input_ids, scores, **kwargs)
        tokens, valid = sampling.top_k_top_p_sampling_from_logits(
            scores if scores.stride(-1) == 1 else scores.contiguous(),
            self.filters.get("top_k", 0),
            self.filters.get("top_p", 1.0),
            temperature=self.filters.get("temperature", 1.0),
            min_p=self.filters.get("min_p", 0.0),
            ties="threshold",
            generator=self.generator,
            return_valid=True,
        )
        torch._assert_async(
            valid.all(),
            f"{_NAME}: a row of the scores has NaN, or no token that is left to draw; check the model's logits",
        )
        return _Drawn(tokens.long(), scores.shape[-1])


_FILTERS: dict[type, str] = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}
"""The processors that the op has, by its names for what they hold (theirs too), in the order in which it applies them."""


def _filters_at_the_end(processors: list) -> tuple[int, dict[str, Any]]:
    """(the index of the first processor that the op stands for, its arguments in their place)."""
    order = list(_FILTERS)
    first, allowed, filters = len(processors), len(order), {}
    if processors and type(processors[-1]) is LogitNormalization:  # softmax makes nothing else of normalised scores
        first -= 1
    while first > 0:
        processor = processors[first - 1]
        if type(processor) not in order[:allowed] or not _is_plain(processor):
            break
        allowed = order.index(type(processor))
        filters[_FILTERS[type(processor)]] = getattr(processor, _FILTERS[type(processor)])
        first -= 1
    return first, filters


def _is_plain(processor: Any) -> bool:
    """What it removes becomes -inf, and it may leave a single token (top_k has taken that into its k)."""
    least = 1 if isinstance(processor, TopKLogitsWarper) else getattr(processor, "min_tokens_to_keep", 1)
    return getattr(processor, "filter_value", -torch.inf) == -torch.inf and least == 1


class _Drawn:
    """Scores that leave one token a row: 0 there, -inf elsewhere, or the probabilities that softmax makes of them. Whatever
    picks tokens by them picks these.

    Not written out for the functions with which `generate` picks them, and for all others `[batch, vocab_size]`, so that a
    decoding loop which picks them in another way is right too.
    """

    def __init__(self, tokens: torch.Tensor, vocab_size: int, are_probs: bool = False):
        self.tokens, self.vocab_size, self.are_probs = tokens, vocab_size, are_probs

    def written_out(self) -> torch.Tensor:
        chosen, other = (1.0, 0.0) if self.are_probs else (0.0, -torch.inf)
        rows = torch.full((len(self.tokens), self.vocab_size), other, device=self.tokens.device)
        return rows.scatter_(1, self.tokens[:, None], chosen)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.written_out(), name)

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if len(args) == 1 and isinstance(args[0], cls):
            drawn, given = args[0], {k: v for k, v in kwargs.items() if k != "_stacklevel" and v is not None}
            if function is F.softmax and given == {"dim": -1} and not drawn.are_probs:
                return cls(drawn.tokens, drawn.vocab_size, are_probs=True)
            if function is torch.multinomial and given == {"num_samples": 1} and drawn.are_probs:
                return drawn.tokens[:, None]
            if function is torch.argmax and given == {"dim": -1}:
                return drawn.tokens
        args, kwargs = tree_map_only(cls, cls.written_out, (args, kwargs))
        return function(*args, **kwargs)
