"""Samplers; deterministic inputs (one token far ahead), so that the draw can be compared."""

import torch
import torch.nn.functional as F

from . import snippet

SAMPLER = "top_k_top_p_sampling_from_logits"
V = 50


def logits(dtype=torch.float32):
    x = torch.randn(3, V, dtype=dtype)
    x[torch.arange(3), torch.tensor([7, 0, V - 1])] = 100.0
    return (x,)


def sure(**options):
    return snippet(logits, kind="sampling", **{"grade": SAMPLER, **options})


def exponential_trick(probs):
    noise = torch.empty_like(probs).exponential_(1)
    return torch.argmax(probs / noise, dim=-1, keepdim=True).to(torch.int)


def top_k_mask(x, k=5):
    kth = torch.topk(x, k)[0][..., -1, None]
    return x.masked_fill(x < kth, -float("inf"))


def top_p_mask(x, p=0.9):
    """Hugging Face's, ascending."""
    ordered, ids = torch.sort(x, descending=False)
    remove = ordered.softmax(-1).cumsum(-1) <= 1 - p
    remove[..., -1:] = 0
    return x.masked_fill(remove.scatter(1, ids, remove), -float("inf"))


def top_p_mask_descending(x, p=0.9):
    ordered, ids = torch.sort(x, descending=True)
    remove = ordered.softmax(-1).cumsum(-1) > p
    remove[..., 1:] = remove[..., :-1].clone()
    remove[..., 0] = 0
    return x.masked_fill(remove.scatter(1, ids, remove), -float("inf"))


@sure()
def gpt_fast(x):
    x = x / 0.8
    values, _ = torch.topk(x, 5)
    pivot = values.select(-1, -1).unsqueeze(-1)
    return exponential_trick(F.softmax(torch.where(x < pivot, -float("inf"), x), dim=-1))


@sure()
def gumbel(x):
    """What Inductor makes of the exponential trick at rate 1.0."""
    noise = torch.empty_like(x).exponential_(1.0)
    return torch.argmax(F.softmax(x, dim=-1) / noise, dim=-1, keepdim=True)


@sure()
def huggingface(x):
    return torch.multinomial(F.softmax(top_p_mask(top_k_mask(x / 0.7)), dim=-1), num_samples=1).squeeze(1)


@sure()
def top_p_descending(x):
    return torch.multinomial(F.softmax(top_p_mask_descending(x), dim=-1), num_samples=1)


@sure()
def plain_multinomial(x):
    return torch.multinomial(F.softmax(x, dim=-1), 1)


@sure()
def half_precision_logits(x):
    return torch.multinomial(F.softmax((x.bfloat16() * 2).float(), dim=-1), 1)


@sure()
def one_row(x):
    return torch.multinomial(F.softmax(x[0], dim=-1), 1)


# ---- near misses ----


@sure(grade="", reason="probabilities")
def probabilities_returned(x):
    probs = F.softmax(top_k_mask(x), dim=-1)
    return exponential_trick(probs), probs


@sure(grade="", reason="2 samples")
def two_samples(x):
    return torch.multinomial(F.softmax(torch.zeros_like(x), dim=-1), 2).sort(-1)[0] * 0


@sure(grade="", reason="not from a softmax")
def weights_not_a_softmax(x):
    return torch.multinomial(x.relu() * (x > 50), 1)


@sure(grade=None)
def greedy(x):
    return torch.argmax(F.softmax(x, -1) / (x.abs() + 1), dim=-1, keepdim=True)


@sure(grade="", reason="not over the vocabulary")
def argmax_over_rows(x):
    probs = F.softmax(x, dim=-1)
    return torch.argmax(probs / torch.empty_like(probs).exponential_(2), dim=0) * 0


@sure()
def top_k_keeps_five_tokens_at_the_end(x):
    """min_tokens_to_keep = 5 is no plain top-p: the mask stays in the graph, the draw from it is ours."""
    ordered, ids = torch.sort(x, descending=False)
    remove = ordered.softmax(-1).cumsum(-1) <= 0.1
    remove[..., -5:] = 0
    return torch.multinomial(F.softmax(x.masked_fill(remove.scatter(1, ids, remove), -float("inf")), dim=-1), 1)
