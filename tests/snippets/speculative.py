"""Speculative decoding: what is drawn after a rejection, and acceptance without a sync; inputs that leave one token to draw.

p is what the draft tokens were drawn from, q what the target model says.
"""

import torch
import torch.nn.functional as F

from . import snippet
from .samplers import exponential_trick

V, K, B = 50, 4, 3
FROM_PROBS = "sampling_from_probs"


def rows():
    """q is above p at one token of each row."""
    q = torch.zeros(B, V)
    q[torch.arange(B), torch.tensor([7, 0, V - 1])] = 1.0
    return torch.full((B, V), 1 / V), q


def one_row():
    p, q = rows()
    return p[0], q[0]


def chain():
    """(draft tokens, p, q): row b accepts b + 1 of 4 draft tokens, after which one token is left to draw."""
    tokens = torch.randint(1, V - 1, (B, K))
    p = torch.full((B, K, V), 1 / V)
    q = torch.zeros(B, K + 1, V)
    for b in range(B):
        for i in range(K + 1):
            q[b, i, tokens[b, i] if i <= b else 0] = 1.0
    return tokens, p, q


def residual(inputs=rows, **options):
    return snippet(inputs, kind="sampling", **{"grade": FROM_PROBS, **options})


@residual(one_row)
def gpt_fast_residual(p, q):
    new = q - p
    new = torch.where(new > 0, new, 0.0)
    new = new / new.sum()
    return exponential_trick(new)


@residual()
def clamped(p, q):
    """Hugging Face's p_prime."""
    p_prime = torch.clamp(q - p, min=0)
    p_prime.div_(p_prime.sum(-1, keepdim=True))
    return torch.multinomial(p_prime, num_samples=1).squeeze(1)


@residual()
def rectified(p, q):
    return torch.multinomial(F.relu(q - p), 1)


@residual()
def where_larger(p, q):
    return torch.multinomial(torch.where(q > p, q - p, 0.0), 1)


@residual()
def masked(p, q):
    new = q - p
    return torch.multinomial(new.masked_fill(new <= 0, 0.0), 1)


@residual()
def maximum_with_nothing(p, q):
    return exponential_trick(torch.maximum(q - p, torch.zeros(())))


@residual()
def half_precision(p, q):
    return torch.multinomial(F.relu(q.bfloat16() - p.bfloat16()), 1)


@residual(lambda: (rows()[0][:, None].expand(-1, K, -1), rows()[1][:, None].expand(-1, K, -1)))
def vllm_recovered(p, q):
    """A token for each place, of which one will be taken."""
    f = torch.clamp(q - p, min=torch.finfo(torch.float32).tiny)
    recovered = (f / torch.sum(f, dim=-1).reshape(B, K, 1)).reshape(B * K, V)
    noise = torch.empty_like(recovered).exponential_(1.0)
    return recovered.div_(noise).argmax(dim=1).view(B, K)


@residual()
def weights_used_as_well(p, q):
    new = F.relu(q - p)
    new = new / new.sum(-1, keepdim=True)
    return torch.multinomial(new, 1), new


def accepted(tokens, p, q):
    """How many draft tokens of each row pass the test one after another."""
    p = p.gather(-1, tokens[..., None])[..., 0]
    q = q[:, :-1].gather(-1, tokens[..., None])[..., 0]
    accept = torch.rand_like(p) < torch.clamp(q / p, max=1.0)
    return accept.int().cumprod(-1).sum(-1)


def chain_acceptance(tokens, p, q):
    """Sync-free: [B, K + 1] tokens, -1 behind the last. Behind a whole chain there is no p, and all of q is left."""
    length = accepted(tokens, p, q)
    at = torch.arange(tokens.shape[0], device=p.device)
    new = q[at, length] - F.pad(p, (0, 0, 0, 1))[at, length]
    new = torch.where(new > 0, new, 0.0)
    last = exponential_trick(new / new.sum(-1, keepdim=True)).long()
    place = torch.arange(tokens.shape[1] + 1, device=p.device)
    behind = torch.where(place == length[:, None], last, -1)
    return torch.where(place < length[:, None], F.pad(tokens, (0, 1)), behind)


residual(chain)(chain_acceptance)


@residual(chain)
def bonus_token(tokens, p, q):
    """Drawn from the target's own row, a softmax of which a part is taken."""
    q = F.softmax(q * 100, dim=-1)
    at = torch.arange(B)
    return torch.multinomial(q[at, tokens.sum(-1) * 0], 1)


# ---- near misses ----

NOT_KNOWN = "not known to be >= 0"


@residual(grade="", reason=NOT_KNOWN)
def probabilities_from_outside(p, q):
    return torch.multinomial(q, 1)


@residual(grade="", reason=NOT_KNOWN)
def not_clamped(p, q):
    return torch.multinomial(q - p * q, 1)


@residual(grade="", reason=NOT_KNOWN)
def clamped_below_zero(p, q):
    return torch.multinomial(torch.clamp(q - p * q, min=-0.5), 1)


@residual(grade="", reason=NOT_KNOWN)
def where_of_something_else(p, q):
    return torch.multinomial(torch.where(p > 0, q - p * q, 0.0), 1)


@residual(grade="", reason=NOT_KNOWN)
def where_larger_than_a_negative_number(p, q):
    new = q - p * q
    return torch.multinomial(torch.where(new > -1, new, 0.0), 1)


@residual(grade="", reason=NOT_KNOWN)
def where_the_other_way_round(p, q):
    return torch.multinomial(torch.where(p * q > q, 0.0, q * 1 - p * q), 1)


@residual(grade="", reason="2 samples")
def two_samples(p, q):
    return torch.multinomial(F.relu(q), 2, replacement=True)
