"""Samplers; deterministic inputs (one token far ahead), so that the draw can be compared."""

import torch
import torch.nn.functional as F

from . import snippet

SAMPLER = "top_k_top_p_sampling_from_logits"
FROM_PROBS = "sampling_from_probs"
SOFTMAX_AND_DRAW = "top_k_top_p_softmax + sampling_from_probs"
V = 50
INF = float("inf")

PIECES: dict[str, tuple[str, ...]] = {}
"""By snippet, what is taken into the op: the spelling of the draw, and its filters."""

DYNAMIC_PIECES = {"samplers.top_k_by_kthvalue": ("multinomial",)}
"""Where they are others with every size symbolic: the k-th smallest of V is no known k-th largest then."""


def logits(dtype=torch.float32):
    x = torch.randn(3, V, dtype=dtype)
    x[torch.arange(3), torch.tensor([7, 0, V - 1])] = 100.0
    return (x,)


def sure(*pieces, inputs=logits, **options):
    register = snippet(inputs, kind="sampling", **{"grade": SAMPLER, **options})

    def named(fn):
        if pieces:
            PIECES[f"{fn.__module__.rpartition('.')[2]}.{fn.__name__}"] = pieces
        return register(fn)

    return named


# ---- draws and filters as they are commonly written ----


def multinomial(x):
    return torch.multinomial(F.softmax(x, dim=-1), num_samples=1)


def exponential_trick(probs):
    noise = torch.empty_like(probs).exponential_(1)
    return torch.argmax(probs / noise, dim=-1, keepdim=True).to(torch.int)


def top_k_mask(x, k=5):
    kth = torch.topk(x, k)[0][..., -1, None]
    return x.masked_fill(x < kth, -float("inf"))


def top_p_mask(x, p=0.9, min_tokens_to_keep=1):
    """Hugging Face's, ascending."""
    ordered, ids = torch.sort(x, descending=False)
    remove = ordered.softmax(-1).cumsum(-1) <= 1 - p
    remove[..., -min_tokens_to_keep:] = 0
    return x.masked_fill(remove.scatter(1, ids, remove), -float("inf"))


def top_p_mask_descending(x, p=0.9):
    ordered, ids = torch.sort(x, descending=True)
    remove = ordered.softmax(-1).cumsum(-1) > p
    remove[..., 1:] = remove[..., :-1].clone()
    remove[..., 0] = 0
    return x.masked_fill(remove.scatter(1, ids, remove), -float("inf"))


def min_p_mask(x, m=0.1, min_tokens_to_keep=1):
    """Hugging Face's."""
    probs = torch.softmax(x, dim=-1)
    remove = probs < m * probs.amax(dim=-1, keepdim=True)
    remove.scatter_(-1, torch.topk(probs, min_tokens_to_keep, dim=-1).indices, False)
    return x.masked_fill(remove, -float("inf"))


# ---- gpt-fast, nanoGPT, Meta ----


@sure("exponential trick", "temperature", "top-k")
def gpt_fast(x):
    x = x / 0.8
    values, _ = torch.topk(x, 5)
    pivot = values.select(-1, -1).unsqueeze(-1)
    return exponential_trick(F.softmax(torch.where(x < pivot, -float("inf"), x), dim=-1))


@sure("exponential trick", "temperature", "top-k", grade=SOFTMAX_AND_DRAW)
def gpt_fast_probabilities_returned(x):
    x = x / 0.8
    values, _ = torch.topk(x, 5)
    pivot = values.select(-1, -1).unsqueeze(-1)
    probs = F.softmax(torch.where(x < pivot, -float("inf"), x), dim=-1)
    return exponential_trick(probs), probs


@sure("multinomial", "temperature", "top-k")
def nano_gpt(x):
    x = x / 0.8
    values, _ = torch.topk(x, min(5, x.size(-1)))
    x[x < values[:, [-1]]] = -float("Inf")
    return multinomial(x)


@sure("multinomial", "temperature", "top-p")
def meta(x):
    """Draws a place in descending order, and looks the token up."""
    ordered, ids = torch.sort(torch.softmax(x / 0.6, dim=-1), dim=-1, descending=True)
    mask = torch.cumsum(ordered, dim=-1) - ordered > 0.9
    ordered[mask] = 0.0
    ordered.div_(ordered.sum(dim=-1, keepdim=True))
    return torch.gather(ids, -1, torch.multinomial(ordered, num_samples=1))


@sure("multinomial", "temperature", "top-k", "top-p")
def drawn_among_the_topk(x):
    values, ids = torch.topk(x / 0.6, 8)
    probs = F.softmax(values, dim=-1)
    keep = probs.cumsum(-1) - probs < 0.9
    probs = torch.where(keep, probs, 0.0)
    return ids.gather(-1, torch.multinomial(probs / probs.sum(-1, keepdim=True), 1))


# ---- Hugging Face ----


@sure("multinomial", "temperature", "top-k", "top-p")
def huggingface(x):
    return multinomial(top_p_mask(top_k_mask(x / 0.7))).squeeze(1)


@sure("multinomial", "temperature", "top-k", "top-p", "min-p")
def huggingface_min_p(x):
    return multinomial(min_p_mask(top_p_mask(top_k_mask(x / 0.7)))).squeeze(1)


@sure("multinomial", "temperature", "min-p")
def min_p_of_older_releases(x):
    x = x / 0.7
    probs = torch.softmax(x, dim=-1)
    remove = probs < 0.1 * probs.amax(dim=-1, keepdim=True)
    ids = torch.argsort(x, descending=True, dim=-1)
    sorted_remove = torch.gather(remove, dim=-1, index=ids)
    sorted_remove[..., :1] = False
    return multinomial(x.masked_fill(sorted_remove.scatter(1, ids, sorted_remove), -float("inf")))


def with_ids():
    return torch.randint(0, V, (3, 6)), logits()[0]


@sure("multinomial", "temperature", "top-k", "top-p", "min-p", inputs=with_ids)
def huggingface_with_repetition_penalty(ids, x):
    """The penalty stays in the graph, in front of the op: two small gathers and a scatter of the tokens that were seen."""
    score = torch.gather(x, 1, ids)
    score = torch.where(score < 0, score * 1.3, score / 1.3)
    x = x.scatter(1, ids, score)
    return multinomial(min_p_mask(top_p_mask(top_k_mask(x / 0.7)))).squeeze(1)


@sure("multinomial", "temperature")
def typical_is_left_alone(x):
    x = top_k_mask(x / 0.7)
    normalized = x.log_softmax(-1)
    entropy = -(normalized * normalized.exp()).nansum(-1, keepdim=True)
    shifted = (-normalized - entropy).abs()
    ordered, ids = torch.sort(shifted, descending=False)
    mass = x.gather(-1, ids).softmax(-1).cumsum(-1)
    last = (mass < 0.9).sum(dim=1).clamp(max=V - 1)
    remove = ordered > ordered.gather(1, last.view(-1, 1))
    remove[..., :1] = 0
    return multinomial(x.masked_fill(remove.scatter(1, ids, remove), -float("inf")) / 0.5)


@sure("multinomial", "temperature", "top-k", "top-p")
def more_tokens_kept_by_top_k(x):
    """min_tokens_to_keep of a top-k is a larger k."""
    return multinomial(top_p_mask(top_k_mask(x / 0.7, max(2, 3))))


@sure("multinomial")
def top_k_keeps_five_tokens_at_the_end(x):
    """min_tokens_to_keep = 5 is no plain top-p: the mask stays in the graph, the draw from it is ours."""
    return multinomial(top_p_mask(x, 0.9, 5))


@sure("multinomial", "min-p")
def five_tokens_kept_by_top_p_before_min_p(x):
    return multinomial(min_p_mask(top_p_mask(x, 0.9, 5)))


@sure("multinomial")
def three_tokens_kept_by_min_p(x):
    return multinomial(min_p_mask(x, 0.1, 3))


# ---- spellings ----


@sure("multinomial", "top-p")
def top_p_descending(x):
    return multinomial(top_p_mask_descending(x))


@sure("multinomial", "top-p")
def top_p_keeps_by_ascending_mass(x):
    ordered, ids = x.sort(-1)
    keep = ordered.softmax(-1).cumsum(-1) > 0.2
    keep[:, -1] = True
    return multinomial(torch.where(torch.zeros_like(keep).scatter(1, ids, keep), x, -INF))


@sure("multinomial", "top-p")
def top_p_in_sorted_order_and_back_by_argsort(x):
    ordered, ids = x.sort(-1, descending=True)
    probs = ordered.softmax(-1)
    keep = probs.cumsum(-1) - probs < 0.9
    keep[:, 0] = True
    return multinomial(ordered.masked_fill(~keep, -INF).gather(-1, ids.argsort(-1)))


@sure("multinomial", "top-p")
def top_p_of_sorted_probabilities(x):
    """Probabilities are sorted, logits are masked; moved on by a concatenation."""
    ordered, ids = x.softmax(-1).sort(-1, descending=True)
    remove = ordered.cumsum(-1) > 0.9
    remove = torch.cat([torch.zeros_like(remove[:, :1]), remove[:, :-1]], -1)
    return multinomial(x.masked_fill(torch.zeros_like(remove).scatter(1, ids, remove), -INF))


@sure("multinomial", "top-p")
def top_p_moved_on_by_padding(x):
    ordered, ids = x.sort(-1, descending=True)
    remove = F.pad((ordered.softmax(-1).cumsum(-1) > 0.9)[:, :-1], (1, 0), value=False)
    return multinomial(x.masked_fill(remove.scatter(1, ids, remove), -INF))


@sure("multinomial", "top-k")
def top_k_by_sorting(x):
    return multinomial(x.masked_fill(x < x.sort(-1).values[:, -5:-4], torch.finfo(x.dtype).min))


@sure("multinomial", "top-k")
def top_k_by_kthvalue(x):
    kth = x.kthvalue(V - 4, dim=-1, keepdim=True).values
    return multinomial(torch.where(x >= kth, x, -INF))


@sure("multinomial", "top-k")
def top_k_by_the_smallest(x):
    return multinomial(torch.where(x.topk(5).values.min(-1, keepdim=True).values > x, -INF, x))


@sure("multinomial", "top-k")
def top_k_of_probabilities(x):
    probs = x.softmax(-1)
    probs = torch.where(probs < probs.topk(5).values[:, -1:], 0.0, probs)
    return torch.multinomial(probs / probs.sum(-1, keepdim=True), 1)


@sure("multinomial", "temperature", "min-p")
def min_p_of_logits(x):
    x = x * 1.25
    return multinomial(x.masked_fill(x < x.amax(-1, keepdim=True) + torch.tensor(0.1).log().item(), -INF))


@sure("multinomial", "top-p", "min-p")
def min_p_first(x):
    """top-p measures what min-p left."""
    return multinomial(top_p_mask(min_p_mask(x)))


@sure("multinomial", "top-k", "top-p")
def top_p_before_top_k(x):
    """top-p measures the whole row."""
    return multinomial(top_k_mask(top_p_mask(x)))


@sure("multinomial")
def plain_multinomial(x):
    return torch.multinomial(F.softmax(x, dim=-1), 1)


@sure("multinomial")
def with_replacement(x):
    return torch.multinomial(F.softmax(x, dim=-1), 1, replacement=True)


@sure("multinomial", "temperature")
def half_precision_logits(x):
    return torch.multinomial(F.softmax((x.bfloat16() * 2).float(), dim=-1), 1)


@sure("multinomial", "temperature", "top-k", "top-p", inputs=lambda: logits(torch.bfloat16))
def huggingface_bf16(x):
    return multinomial(top_p_mask(top_k_mask(x / 0.5)))


@sure("multinomial", "temperature", "top-k", "top-p", inputs=lambda: logits(torch.float16))
def huggingface_fp16(x):
    return multinomial(top_p_mask(top_k_mask(x.float() / 0.5)))


@sure("multinomial")
def one_row(x):
    return torch.multinomial(F.softmax(x[0], dim=-1), 1)


@sure("exponential trick", "temperature", "top-k")
def one_row_of_gpt_fast(x):
    return exponential_trick(F.softmax(top_k_mask(x[0] / 0.8), dim=-1))


# ---- what else is used ----


@sure("exponential trick", "top-k", grade=SOFTMAX_AND_DRAW)
def probabilities_returned(x):
    probs = F.softmax(top_k_mask(x), dim=-1)
    return exponential_trick(probs), probs


@sure("exponential trick", "top-k", grade=SOFTMAX_AND_DRAW, inputs=lambda: logits(torch.bfloat16))
def half_precision_probabilities_returned(x):
    probs = F.softmax(top_k_mask(x), dim=-1)
    return exponential_trick(probs), probs


@sure("multinomial", "temperature", "top-k", "top-p", "min-p", grade=SOFTMAX_AND_DRAW)
def probabilities_used_before_the_draw(x):
    probs = F.softmax(min_p_mask(top_p_mask(top_k_mask(x / 0.7))), dim=-1)
    entropy = -(probs * torch.where(probs > 0, probs, 1.0).log()).sum(-1)
    token = torch.multinomial(probs, 1)
    return token, entropy, probs.gather(-1, token)


@sure("multinomial", "top-k", grade=SOFTMAX_AND_DRAW)
def one_row_of_probabilities_returned(x):
    probs = F.softmax(top_k_mask(x[0]), dim=-1)
    return torch.multinomial(probs, 1), probs


@sure("multinomial", grade=FROM_PROBS)
def plain_probabilities_returned(x):
    """Nothing to filter: the graph's softmax stays, with what Inductor fuses it with."""
    probs = F.softmax(x / 0.7, dim=-1)
    return torch.multinomial(probs, 1), probs


@sure("multinomial", grade=FROM_PROBS)
def sorted_probabilities_returned(x):
    ordered, ids = torch.sort(torch.softmax(x, dim=-1), dim=-1, descending=True)
    return torch.gather(ids, -1, torch.multinomial(ordered, num_samples=1)), ordered


@sure("multinomial")
def masked_logits_returned(x):
    """They are computed anyway: the op starts from there."""
    x = top_k_mask(x / 0.7)
    return multinomial(x), x


@sure("multinomial", "top-k")
def scaled_logits_returned(x):
    x = x / 0.7
    return multinomial(top_k_mask(x)), x


# ---- near misses ----


@sure(grade="", reason="2 samples")
def two_samples(x):
    return torch.multinomial(F.softmax(torch.zeros_like(x), dim=-1), 2).sort(-1)[0] * 0


@sure(grade="", reason="2 samples")
def two_samples_with_replacement(x):
    return torch.multinomial(F.softmax(x, dim=-1), 2, replacement=True)


@sure(grade="", reason="not known to be >= 0")
def weights_not_a_softmax(x):
    return torch.multinomial(x * (x > 50), 1)


@sure(grade=None)
def greedy(x):
    return torch.argmax(F.softmax(x, -1) / (x.abs() + 1), dim=-1, keepdim=True)


@sure(grade="", reason="not over the vocabulary")
def argmax_over_rows(x):
    probs = F.softmax(x, dim=-1)
    return torch.argmax(probs / torch.empty_like(probs).exponential_(2), dim=0) * 0


@sure(grade=None)
def one_noise_for_all_rows(x):
    """Rows whose draws depend on each other."""
    probs = F.softmax(x, dim=-1)
    return torch.argmax(probs / torch.empty_like(probs[:1]).exponential_(), dim=-1)


@sure(grade="", reason="random numbers that race are used elsewhere")
def noise_returned(x):
    probs = F.softmax(x, dim=-1)
    noise = torch.empty_like(probs).exponential_()
    return torch.argmax(probs / noise, dim=-1), (noise > 0).all()


@sure("multinomial")
def top_p_without_the_crossing_token(x):
    """What `cumsum > p` removes without being moved on is more than top-p does."""
    ordered, ids = x.sort(-1, descending=True)
    remove = ordered.softmax(-1).cumsum(-1) > 0.9
    remove[:, 0] = False
    return multinomial(x.masked_fill(remove.scatter(1, ids, remove), -INF))


@sure("multinomial")
def top_p_of_other_logits(x):
    ordered, ids = x.sort(-1)
    remove = (ordered * 2).softmax(-1).cumsum(-1) <= 0.1
    remove[:, -1] = False
    return multinomial(x.masked_fill(remove.scatter(1, ids, remove), -INF))


@sure("multinomial")
def top_p_put_back_by_other_ids(x):
    ordered, _ = x.sort(-1)
    remove = ordered.softmax(-1).cumsum(-1) <= 0.1
    remove[:, -1] = False
    _, ids = (x + x.flip(-1) * 1e-3).sort(-1)
    return multinomial(x.masked_fill(remove.scatter(1, ids, remove), -INF))


@sure("multinomial")
def top_k_of_other_logits(x):
    return multinomial(x.masked_fill(x < (x * 0.5).topk(5).values[:, -1:], -INF))


@sure("multinomial")
def the_last_of_an_unsorted_topk(x):
    """It may be any of the k."""
    return multinomial(x.masked_fill(x < x.topk(5, sorted=False).values[:, -1:], -INF))


@sure("multinomial")
def top_k_of_rounded_logits(x):
    """What the threshold is rounded to may be above the k-th."""
    return multinomial(x.masked_fill(x < x.bfloat16().topk(5).values[:, -1:].float(), -INF))


@sure("multinomial", "temperature")
def a_low_number_of_its_own(x):
    """Scores of -100 may be drawn once they are scaled."""
    return multinomial(x.masked_fill(x < x.topk(5).values[:, -1:], -100.0) / 0.5)


@sure("multinomial")
def strictly_above_the_kth(x):
    return multinomial(x.masked_fill(x <= x.topk(5).values[:, -1:], -INF))


@sure("multinomial")
def smallest_removed(x):
    return multinomial(x.masked_fill(x < x.topk(5, largest=False).values[:, -1:], -INF))


@sure("multinomial")
def min_p_above_one(x):
    return multinomial(min_p_mask(x, 1.5))


@sure("multinomial", "temperature")
def filtered_before_the_temperature(x):
    """top-p and min-p look at another distribution before the temperature than after it."""
    return multinomial(min_p_mask(top_p_mask(x)) / 0.5)


@sure("multinomial", "top-k")
def two_top_ks(x):
    return multinomial(top_k_mask(top_k_mask(x, 9)))


@sure(grade="sampling_from_probs")
def masses_that_do_not_sum_to_one(x):
    """Mass of weights that do not sum to 1 is no probability, so this is no top-p; the draw alone is rewritten."""
    weights = x.softmax(-1)
    weights = torch.where(weights < weights.topk(5).values[:, -1:], 0.0, weights)
    ordered, ids = weights.sort(-1, descending=True)
    ordered = torch.where(ordered.cumsum(-1) - ordered > 0.9, 0.0, ordered)
    return torch.gather(ids, -1, torch.multinomial(ordered, 1))
