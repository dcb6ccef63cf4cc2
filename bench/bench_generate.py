"""The sampling step of Hugging Face's `generate`, from a step's logits to its tokens, without and with the integration.

Both run what `generate`'s decoding loop does there: the logits processors, softmax and multinomial, which with
`fi_ops.integrations.transformers` are one op behind the processors that it has not. In eager mode, as the loop is: on CUDA
launches are part of the time. The ceiling is one read of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from fi_ops.library import SPECS, Cost
from fi_ops.library._sampling import kept_probs

from .harness import Candidate, Case, Options, copies_beyond_caches

SPEC = SPECS["top_k_top_p_sampling_from_logits"]
PROMPT = 100

# what `generate` is called with; the first is its default
SETTINGS: list[dict[str, float]] = [
    dict(top_k=50),
    dict(temperature=0.8, top_k=50, top_p=0.9),
    dict(top_p=0.9),
    dict(temperature=0.8, min_p=0.05),
    dict(repetition_penalty=1.1, temperature=0.8, top_k=50, top_p=0.9),
]


def processors(settings: dict) -> list:
    """In the order in which `generate` applies them."""
    from transformers.generation import logits_process as hf

    kinds = {
        "repetition_penalty": hf.RepetitionPenaltyLogitsProcessor,
        "temperature": hf.TemperatureLogitsWarper,
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
    }
    return hf.LogitsProcessorList([make(settings[name]) for name, make in kinds.items() if name in settings])


def step(logits_processor) -> Callable:
    """What the decoding loop does with a step's logits."""

    def run(input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        scores = logits_processor(input_ids, logits)
        return torch.multinomial(F.softmax(scores, dim=-1), num_samples=1).squeeze(1)

    return run


def check(scores: torch.Tensor, settings: dict) -> Callable[[torch.Tensor], str]:
    """Tokens are in the support by the float64 reference; `scores` are what the filters get."""
    filters = {name: settings[name] for name in ("temperature", "top_k", "top_p", "min_p") if name in settings}
    probs = kept_probs(scores, **filters, top_k_ties="threshold")

    def run(tokens: torch.Tensor) -> str:
        outside = int((probs.gather(1, tokens[:, None]) == 0).sum())
        return "ok" if outside == 0 else f"{outside} tokens outside the support"

    return run


def cases(options: Options) -> Iterator[Case]:
    from fi_ops.integrations.transformers import DrawingProcessors

    vocab, device = options.vocab or 128256, options.device
    batches = (options.batch,) if options.batch else (1, 16)
    for batch in batches:
        logits = torch.randn(batch, vocab, device=device) * 3
        input_ids = torch.randint(0, vocab, (batch, PROMPT), device=device)
        copies = copies_beyond_caches((input_ids, logits), logits.nbytes, at_most=32 if device == "cuda" else 1)
        for settings in SETTINGS[:2] if options.quick else SETTINGS:
            theirs = processors(settings)
            plain = type(theirs)(p for p in theirs if "Penalty" in type(p).__name__)
            name = ", ".join(f"{key} {value}" for key, value in settings.items())
            yield Case(
                f"{name}, B={batch}, V={vocab}",
                [
                    Candidate("Hugging Face", step(theirs), inputs=copies, capture=False),
                    Candidate("fi_ops", step(DrawingProcessors(theirs)), ours=True, inputs=copies, capture=False),
                ],
                Cost(SPEC.cost(logits, torch.empty(batch)).bytes),
                check(plain(input_ids, logits), settings),
            )
