"""Speculative sampling: which draft tokens the target model accepts, and the token that follows them.

Shapes: `draft_probs [batch, num_speculative_tokens, vocab_size]`, `draft_token_ids [batch, num_speculative_tokens]`,
`target_probs [batch, num_speculative_tokens + 1, vocab_size]`, `uniform [batch, num_speculative_tokens + 1]`.
"""

from __future__ import annotations

import math

import torch

from ._checks import check, check_dtype, check_last_dim_contiguous, check_ndim, check_same_device, check_shape
from ._sampling import draw, kept_probs, middle_uniform
from ._spec import INDEX_TYPES, Cost, ErrorSample, Sample, op

_NAME = "chain_speculative_sampling"


def _fake(draft_probs, draft_token_ids, uniform, target_probs):
    check_dtype(_NAME, "draft_probs", draft_probs, (torch.float32,))
    check_ndim(_NAME, "draft_probs", draft_probs, 3, "[batch, num_speculative_tokens, vocab_size]")
    check_last_dim_contiguous(_NAME, "draft_probs", draft_probs)
    batch, num, vocab = draft_probs.shape
    check(
        _NAME,
        vocab > 0,
        lambda: "draft_probs must have at least one column, got vocab_size 0; pass probabilities",
    )
    check_same_device(_NAME, "draft_token_ids", draft_token_ids, "draft_probs", draft_probs)
    check_dtype(_NAME, "draft_token_ids", draft_token_ids, INDEX_TYPES)
    check_shape(_NAME, "draft_token_ids", draft_token_ids, (batch, num), "[batch, num_speculative_tokens]")
    check_same_device(_NAME, "uniform", uniform, "draft_probs", draft_probs)
    check_dtype(_NAME, "uniform", uniform, (torch.float32,))
    check_shape(_NAME, "uniform", uniform, (batch, num + 1), "[batch, num_speculative_tokens + 1]")
    check_same_device(_NAME, "target_probs", target_probs, "draft_probs", draft_probs)
    check_dtype(_NAME, "target_probs", target_probs, (torch.float32,))
    layout = "[batch, num_speculative_tokens + 1, vocab_size]"
    check_shape(_NAME, "target_probs", target_probs, (batch, num + 1, vocab), layout)
    check_last_dim_contiguous(_NAME, "target_probs", target_probs)
    device = draft_probs.device
    counts = [torch.empty((batch,), dtype=torch.int32, device=device) for _ in range(2)]
    return torch.empty((batch, num + 1), dtype=draft_token_ids.dtype, device=device), *counts


def _final_probs(draft: torch.Tensor | None, target: torch.Tensor) -> torch.Tensor:
    """What the token behind the accepted ones is drawn from, float64 `[vocab_size]`, NaN where nothing can be drawn.

    `draft`: the distribution of the draft token that was refused, None where none was.
    """
    if draft is not None:
        residual = kept_probs((target - draft).clamp_min(0)[None], from_probs=True)[0]
        if not residual.isnan().any():
            return residual
    return kept_probs(target[None], from_probs=True)[0]


def _samples(device, dtype):
    generator = torch.Generator().manual_seed(24)

    def probs(*shape, spread=2.0):
        return (torch.randn(*shape, generator=generator) * spread).softmax(-1)

    def sample(name, draft, target, index=torch.int64):
        """Uniforms in the middle of what they decide: half of the draft tokens are accepted, a few more often."""
        batch, num, vocab = draft.shape
        ids = torch.randint(0, vocab, (batch, num), generator=generator)
        likely = draft.argmax(-1)
        ids = torch.where(torch.rand(batch, num, generator=generator) < 0.7, likely, ids)
        uniform = torch.rand(batch, num + 1, generator=generator) * 0.98 + 0.01
        p, q = draft.gather(2, ids[..., None])[..., 0], target[:, :num].gather(2, ids[..., None])[..., 0]
        uniform[:, :num] = torch.where(((uniform[:, :num] * p - q) / q).abs() < 1e-3, 0.0, uniform[:, :num])
        wanted = uniform[:, num].double()
        for b in range(batch):
            accepted = uniform[b, :num] * p[b] < q[b]
            at = next((i for i in range(num) if not accepted[i]), num)
            final = _final_probs(draft[b, at] if at < num else None, target[b, at])
            uniform[b, num] = middle_uniform(final[None], wanted[b : b + 1])[0]
        return Sample((draft, ids.to(index), uniform, target), {}, name).map_tensors(lambda t: t.to(device))

    draft = probs(6, 4, 300)
    near = (draft.log() + torch.randn(6, 4, 300, generator=generator) * 0.3).softmax(-1)
    yield sample("typical", draft, torch.cat([near, probs(6, 1, 300)], 1))
    yield sample("unlike each other", probs(5, 3, 97), probs(5, 4, 97), torch.int32)
    yield sample("one draft token", probs(4, 1, 64), probs(4, 2, 64))
    yield sample("no draft token", probs(3, 0, 50), probs(3, 1, 50))
    yield sample("the draft is the target", draft, torch.cat([draft, probs(6, 1, 300)], 1))
    big = probs(2, 2, 40_001)
    noise = torch.randn(big.shape, generator=generator) * 0.1
    yield sample("large", big, torch.cat([(big.log() + noise).softmax(-1), probs(2, 1, 40_001)], 1))
    padded = torch.cat([near, probs(6, 1, 300)], 1)
    yield sample("strided", torch.nn.functional.pad(draft, (0, 9))[::2, 1:3, :300], padded[::2, 1:4])
    yield sample("unnormalised", draft * 3, torch.cat([near * 2, probs(6, 1, 300) * 9], 1))
    special = torch.cat([near, probs(6, 1, 300)], 1)
    special[0], special[1, :, 7], special[2, 0], special[3, 4] = 0.0, math.nan, -1.0, 0.0
    yield sample("rows that can't be sampled", draft, special)
    sure = torch.zeros(2, 3, 20)
    sure[..., 4] = 1.0
    yield sample("certain", sure[:, :2], sure)
    yield sample("no rows", probs(0, 3, 20), probs(0, 4, 20))


def _errors(device):
    p, q = torch.rand(2, 3, 8, device=device), torch.rand(2, 4, 8, device=device)
    ids, u = torch.zeros(2, 3, dtype=torch.int64, device=device), torch.rand(2, 4, device=device)
    yield ErrorSample((p.half(), ids, u, q), r"draft_probs must be float32, got float16; convert")
    text = r"draft_probs must be \[batch, num_speculative_tokens, vocab_size\], got \[3, 8\]; reshape"
    yield ErrorSample((p[0], ids, u, q), text)
    yield ErrorSample((p[..., :0], ids, u, q), r"draft_probs must have at least one column, got vocab_size 0; pass")
    yield ErrorSample((p[..., ::2], ids, u, q), r"draft_probs must have a contiguous last dimension, got strides")
    yield ErrorSample((p, ids.float(), u, q), r"draft_token_ids must be int32 or int64, got float32; convert")
    text = r"draft_token_ids must be \[batch, num_speculative_tokens\] = \[2, 3\], got \[2, 2\]"
    yield ErrorSample((p, ids[:, :2], u, q), text)
    text = r"uniform must be \[batch, num_speculative_tokens \+ 1\] = \[2, 4\], got \[2, 3\]"
    yield ErrorSample((p, ids, u[:, :3], q), text)
    yield ErrorSample((p, ids, u.double(), q), r"uniform must be float32, got float64")
    text = r"target_probs must be \[batch, num_speculative_tokens \+ 1, vocab_size\] = \[2, 4, 8\], got \[2, 3, 8\]"
    yield ErrorSample((p, ids, u, q[:, :3]), text)
    yield ErrorSample((p, ids, u, q.half()), r"target_probs must be float32, got float16; convert")
    text = r"draft_token_ids must be in \[0, 8\), got {} at \[{}\]; pass tokens of the vocabulary"
    bad = ids.clone()
    bad[1, 2] = 8
    yield ErrorSample((p, bad, u, q), text.format(8, "1, 2"), needs_values=True)
    bad = ids - 1
    yield ErrorSample((p, bad, u, q), text.format(-1, "0, 0"), needs_values=True)
    bad = u.clone()
    bad[0, 3] = 1
    yield ErrorSample((p, ids, bad, q), r"uniform must be in \[0, 1\), got 1 at \[0, 3\]; draw", needs_values=True)


def _cost(draft_probs, draft_token_ids, uniform, target_probs):
    """One row of each distribution: that of the first draft token which is refused."""
    return Cost(bytes=2 * draft_probs.shape[0] * draft_probs.shape[2] * 4 + uniform.nbytes + draft_token_ids.nbytes)


@op(
    "(Tensor draft_probs, Tensor draft_token_ids, Tensor uniform, Tensor target_probs) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    samples=_samples,
    errors=_errors,
    cost=_cost,
    dtypes=(torch.float32,),
    exact=True,
)
def chain_speculative_sampling(draft_probs, draft_token_ids, uniform, target_probs):
    """Accept a chain of draft tokens against the target's probabilities, and draw the token that follows.

    Draft token i is accepted where `uniform[i] * draft_probs[i, token] < target_probs[i, token]`; the first one that is
    not ends the chain, and a token drawn from `max(target_probs - draft_probs, 0)` takes its place (from target_probs
    where that leaves nothing; id 0 where they have nothing either); behind a whole chain one is drawn from the last of
    target_probs. That draw uses `uniform[num_speculative_tokens]`.

    Returns `(output_token_ids [batch, num_speculative_tokens + 1], accepted [batch] int32, emitted [batch] int32)`: ids of
    draft_token_ids' dtype, -1 behind the last; how many draft tokens pass the test each by itself; how many of them the
    output has.
    """
    batch, num, _ = draft_probs.shape
    output = torch.full((batch, num + 1), -1, dtype=draft_token_ids.dtype, device=draft_probs.device)
    p = draft_probs.double().gather(2, draft_token_ids.long()[..., None])[..., 0]
    q = target_probs[:, :num].double().gather(2, draft_token_ids.long()[..., None])[..., 0]
    passes = uniform[:, :num].double() * p < q
    emitted = passes.int().cumprod(1).sum(1)
    for b, at in enumerate(emitted.tolist()):
        output[b, :at] = draft_token_ids[b, :at]
        final = _final_probs(draft_probs[b, at] if at < num else None, target_probs[b, at])
        output[b, at] = draw(final[None], uniform[b, num:])[0][0]
    return output, passes.sum(1).int(), emitted.int()
