"""Sampling from logits: temperature, top-k, min-p and top-p in one op, the random numbers an argument.

Shapes: logits `[rows, vocab_size]` (last dim contiguous), everything per draw `[batch]`; `indices [batch]` maps a draw
to its row (default: draw i uses row i, batch = rows).

Every filter keeps a prefix of the row in one fixed order, larger logit first and lower id first among equals, so the
kept set is always a prefix too. Rows with special values: any NaN, or nothing but -inf, is id 0 and valid False; where a
row has +inf, those tokens alone share the probability, equally (the limit of ever larger logits).
"""

from __future__ import annotations

import math

import torch

from ._checks import check, check_dtype, check_last_dim_contiguous, check_ndim, check_same_device, check_shape
from ._spec import FLOATS, INDEX_TYPES, Cost, ErrorSample, Sample, op

_NAME = "top_k_top_p_sampling_from_logits"
_SCHEMA = (
    "(Tensor logits, Tensor uniform, Tensor? top_k_arr=None, int top_k=0, Tensor? top_p_arr=None, float top_p=1.0, "
    "Tensor? min_p_arr=None, float min_p=0.0, Tensor? temperature_arr=None, float temperature=1.0, "
    'Tensor? indices=None, *, bool top_k_first=True, str top_k_ties="exact") -> (Tensor, Tensor)'
)


def _check_array(arg: str, t: torch.Tensor | None, dtypes, logits: torch.Tensor, batch) -> None:
    if t is not None:
        check_same_device(_NAME, arg, t, "logits", logits)
        check_dtype(_NAME, arg, t, dtypes)
        check_shape(_NAME, arg, t, (batch,), "[batch]")


def _fake(
    logits,
    uniform,
    top_k_arr=None,
    top_k=0,
    top_p_arr=None,
    top_p=1.0,
    min_p_arr=None,
    min_p=0.0,
    temperature_arr=None,
    temperature=1.0,
    indices=None,
    *,
    top_k_first=True,
    top_k_ties="exact",
):
    check_dtype(_NAME, "logits", logits, FLOATS)
    check_ndim(_NAME, "logits", logits, 2, "[rows, vocab_size]")
    check_last_dim_contiguous(_NAME, "logits", logits)
    check(
        _NAME,
        logits.shape[1] > 0,
        lambda: "logits must have at least one column, got vocab_size 0; pass a row of logits",
    )
    if indices is not None:
        check_same_device(_NAME, "indices", indices, "logits", logits)
        check_dtype(_NAME, "indices", indices, INDEX_TYPES)
        check_ndim(_NAME, "indices", indices, 1, "[batch]")
    batch = logits.shape[0] if indices is None else indices.shape[0]
    check_same_device(_NAME, "uniform", uniform, "logits", logits)
    check_dtype(_NAME, "uniform", uniform, (torch.float32,))
    if uniform.dim() == 2:
        check_shape(_NAME, "uniform", uniform, (1, batch), "[batch] or [1, batch]")
    else:
        check_shape(_NAME, "uniform", uniform, (batch,), "[batch] or [1, batch]")
    _check_array("top_k_arr", top_k_arr, INDEX_TYPES, logits, batch)
    _check_array("top_p_arr", top_p_arr, (torch.float32,), logits, batch)
    _check_array("min_p_arr", min_p_arr, (torch.float32,), logits, batch)
    _check_array("temperature_arr", temperature_arr, (torch.float32,), logits, batch)
    check(_NAME, top_p >= 0, lambda: f"top_p must be a number >= 0, got {top_p:g}; pass 1 to keep all tokens")
    check(_NAME, 0 <= min_p <= 1, lambda: f"min_p must be in [0, 1], got {min_p:g}; pass 0 to keep all tokens")
    check(_NAME, temperature >= 0, lambda: f"temperature must be a number >= 0, got {temperature:g}; pass 0 for argmax")
    check(
        _NAME,
        top_k_ties in ("exact", "threshold"),
        lambda: f"top_k_ties must be 'exact' or 'threshold', got '{top_k_ties}'; pass one of the two",
    )
    samples = torch.empty((batch,), dtype=torch.int32 if indices is None else indices.dtype, device=logits.device)
    return samples, torch.empty((batch,), dtype=torch.bool, device=logits.device)


def kept_probs(
    logits, top_k=0, top_p=1.0, min_p=0.0, temperature=1.0, *, top_k_first=True, top_k_ties="exact"
) -> torch.Tensor:
    """The distribution that is sampled from: float64, filtered, normalised; rows that can't be sampled are all NaN.

    logits `[batch, vocab_size]`; each parameter a number or a tensor `[batch]`.
    """
    x = logits.double()
    batch, vocab = x.shape

    def column(value) -> torch.Tensor:
        return torch.as_tensor(value, dtype=torch.float64, device=x.device).expand(batch)[:, None]

    k, p, m, t = (column(v) for v in (top_k, top_p, min_p, temperature))
    x = torch.where(x.isnan().any(-1, keepdim=True), math.nan, x)  # a sort need not put -NaN where it puts NaN
    infinite = (x == math.inf).any(-1, keepdim=True)
    x = torch.where(infinite, torch.where(x == math.inf, 0.0, -math.inf), x)

    x, ids = torch.sort(x, dim=-1, descending=True, stable=True)  # stable: lowest id first among equals
    rank = torch.arange(vocab, device=x.device).expand(batch, vocab)
    below = x - x[:, :1]  # -inf - -inf is NaN: those rows can't be sampled, and end as NaN
    weight = torch.where(t > 0, (below / t.clamp_min(1e-300)).exp(), (below == 0).double())
    weight = torch.where(below == -math.inf, 0.0, weight)
    # temperature 0 and top_p 0 are argmax, whatever else is asked for
    k = torch.where((k <= 0) | (k >= vocab), float(vocab), k)
    first_only = (t == 0) | (p == 0)

    in_top_k = rank < k
    if top_k_ties == "threshold":
        in_top_k = x >= x.gather(1, (k.long() - 1).clamp_min(0))
    in_min_p = weight >= m * weight[:, :1]
    mass = weight * (in_top_k & in_min_p) if top_k_first else weight
    before = mass.cumsum(-1) - mass  # the mass in front of a token: it is kept while that is short of p
    in_top_p = (p >= 1) | (before < p * mass.sum(-1, keepdim=True)) | (rank == 0)
    keep = torch.where(first_only, rank == 0, in_top_k & in_min_p & in_top_p)

    kept = torch.zeros_like(weight).scatter(1, ids, weight * keep)
    return kept / kept.sum(-1, keepdim=True)


def _samples(device, dtype):
    generator = torch.Generator().manual_seed(20)

    def rand(*shape, scale=3.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    def draw(name, logits, *, indices=None, batch=None, **options):
        """A sample whose uniforms sit in the middle of their token's interval: rounding can't change the answer."""
        batch = batch or (logits.shape[0] if indices is None else indices.shape[0])
        params = {
            key: options.get(f"{key}_arr", options.get(key)) for key in ("top_k", "top_p", "min_p", "temperature")
        }
        params = {key: value for key, value in params.items() if value is not None}
        modes = {key: options[key] for key in ("top_k_first", "top_k_ties") if key in options}
        cdf = (
            kept_probs(logits if indices is None else logits[indices.long()], **params, **modes)
            .nan_to_num(0)
            .cumsum(-1)
        )
        wanted = torch.rand(batch, 1, generator=generator, dtype=torch.float64) * 0.98 + 0.01
        token = (cdf <= wanted).sum(-1, keepdim=True).clamp_max(logits.shape[1] - 1)
        upper = cdf.gather(1, token)
        lower = torch.where(token > 0, cdf.gather(1, (token - 1).clamp_min(0)), 0.0)
        uniform = ((lower + upper) / 2).float().squeeze(1).clamp(0, 1 - 2**-24)
        if indices is not None:
            options["indices"] = indices
        return Sample((logits, uniform), options, name).map_tensors(lambda t: t.to(device))

    def ints(*values):
        return torch.tensor(values, dtype=torch.int32)

    def floats(*values):
        return torch.tensor(values, dtype=torch.float32)

    yield draw("typical", rand(4, 1000), top_k=50, top_p=0.83)
    yield draw("no filter", rand(5, 97))
    yield draw("top-k alone", rand(3, 333), top_k=7)
    yield draw("top-p alone", rand(4, 2500, scale=1.0), top_p=0.9)
    yield draw("min-p alone", rand(3, 501), min_p=0.03)
    yield draw("every filter", rand(4, 700), top_k=90, top_p=0.93, min_p=0.011, temperature=0.7)
    yield draw(
        "every filter, joint", rand(4, 700), top_k=90, top_p=0.71, min_p=0.011, temperature=0.9, top_k_first=False
    )
    yield draw("joint, top_k binds", rand(3, 700, scale=1.0), top_k=9, top_p=0.71, top_k_first=False)
    yield draw("large top_k", rand(3, 3000), top_k=1700, top_p=0.97, temperature=3.0)
    yield draw("hot, no filter", rand(2, 5000), temperature=50.0)
    yield draw("cold", rand(3, 5000), temperature=0.05, top_p=0.95)
    yield draw("temperature 0", rand(3, 200), temperature=0.0, top_p=0.5)
    yield draw("top_p 0 and top_k 1", rand(2, 200), top_k_arr=ints(0, 1), top_p_arr=floats(0.0, 1.0))
    yield draw("keep all by large parameters", rand(2, 64), top_k=64, top_p=1.5)
    yield draw(
        "per-row arrays",
        rand(4, 900),
        top_k_arr=torch.tensor([-1, 20, 2000, 300]),
        top_p_arr=floats(0.8, 1.0, 0.95, 0.6),
        min_p_arr=floats(0.0, 0.01, 0.0, 0.02),
        temperature_arr=floats(1.0, 0.5, 2.0, 0.0),
    )
    yield draw("indices", rand(3, 400), indices=torch.tensor([2, 0, 0, 1, 2]), top_k=20, top_p=0.9)
    yield draw("int32 indices, arrays", rand(2, 130), indices=ints(1, 1, 0), top_k_arr=ints(3, 9, 0))
    strided = rand(6, 512)[::2, :300]
    yield draw("strided rows", strided, top_k=40, top_p=0.9)

    ties = torch.randint(0, 4, (4, 300), generator=generator).to(dtype)
    yield draw("ties, exact", ties, top_k=20)
    yield draw("ties, threshold", ties, top_k=20, top_k_ties="threshold")
    yield draw("ties, top-p", ties * 2, top_k=150, top_p=0.77)
    yield draw("all equal", torch.full((3, 4099), 1.5).to(dtype), top_k=1000, top_p=0.5)
    yield draw("ties of the maximum, top_k 1 threshold", ties, top_k=1, top_k_ties="threshold")

    masked = rand(4, 600)
    masked[:, ::3] = -torch.inf
    masked[1, 5:] = -torch.inf
    yield draw("-inf logits", masked, top_k=450, top_p=0.9)
    masked[:, 1::3] = torch.finfo(dtype).min
    yield draw("lowest finite logits", masked, top_p=0.9)

    special = rand(6, 150)
    special[0, 17] = torch.nan
    special[1] = -torch.inf
    special[2] = torch.nan
    special[3, [5, 70, 71]] = torch.inf
    special[4, 1:] = -torch.inf
    special[5, 9] = -torch.nan
    yield draw("degenerate rows", special, top_p=0.9)
    yield draw("degenerate rows, no filter", special)
    yield draw("degenerate rows, argmax", special, temperature=0.0)
    yield draw("denormal logits", torch.arange(64).float()[None].mul(1e-41).to(dtype), top_k=11, top_p=0.78)
    yield draw("one token", rand(2, 1), top_k=5, top_p=0.5)
    yield draw("no rows", rand(0, 10), top_k=5)
    uniform = Sample(
        (rand(3, 50).to(device), torch.zeros(1, 3, device=device)), {"top_k": 4}, "uniform [1, batch], zeros"
    )
    yield uniform


def _errors(device):
    x, u = torch.randn(2, 8, device=device), torch.rand(2, device=device)
    yield ErrorSample((x.double(), u), r"logits must be float32, bfloat16 or float16, got float64; convert")
    yield ErrorSample((x[0], u), r"logits must be \[rows, vocab_size\], got \[8\]; reshape it to 2 dimensions")
    yield ErrorSample((x.t(), u), r"logits must have a contiguous last dimension, got strides \[1, 8\]; call")
    yield ErrorSample((x[:, :0], u), r"logits must have at least one column, got vocab_size 0; pass")
    yield ErrorSample((x, u[:1]), r"uniform must be \[batch\] or \[1, batch\] = \[2\], got \[1\]; check")
    yield ErrorSample((x, u[:, None]), r"uniform must be \[batch\] or \[1, batch\] = \[1, 2\], got \[2, 1\]; check")
    yield ErrorSample((x, u.double()), r"uniform must be float32, got float64; convert")
    yield ErrorSample((x, u), r"indices must be int32 or int64, got float32", {"indices": u})
    yield ErrorSample((x, u), r"top_k_arr must be int32 or int64, got float32", {"top_k_arr": u})
    yield ErrorSample((x, u), r"top_p_arr must be \[batch\] = \[2\], got \[1\]; check", {"top_p_arr": u[:1]})
    yield ErrorSample((x, u), r"min_p_arr must be float32, got float64; convert", {"min_p_arr": u.double()})
    yield ErrorSample((x, u), r"temperature_arr must be \[batch\] = \[2\], got \[1, 2\]", {"temperature_arr": u[None]})
    yield ErrorSample((x, u), r"top_p must be a number >= 0, got nan; pass 1", {"top_p": math.nan})
    yield ErrorSample((x, u), r"top_p must be a number >= 0, got -0.5; pass 1", {"top_p": -0.5})
    yield ErrorSample((x, u), r"min_p must be in \[0, 1\], got 1.5; pass 0", {"min_p": 1.5})
    yield ErrorSample((x, u), r"min_p must be in \[0, 1\], got nan; pass 0", {"min_p": math.nan})
    yield ErrorSample((x, u), r"temperature must be a number >= 0, got -1; pass 0", {"temperature": -1.0})
    yield ErrorSample((x, u), r"top_k_ties must be 'exact' or 'threshold', got 'any'; pass", {"top_k_ties": "any"})
    if torch.device(device).type != "meta":
        other = torch.empty(2, device="meta")
        yield ErrorSample((x, other), r"uniform must be on logits's device .*, got .*; move")

    def values(match, **options):
        return ErrorSample((x, u), match, options, needs_values=True)

    def floats(*numbers):
        return torch.tensor(numbers, device=device)

    yield ErrorSample((x, floats(0.5, 1.0)), r"uniform must be in \[0, 1\), got 1 at 1; draw", needs_values=True)
    yield ErrorSample((x, floats(math.nan, 0.0)), r"uniform must be in \[0, 1\), got nan at 0; draw", needs_values=True)
    yield values(r"top_p_arr must be numbers >= 0, got nan at 1; pass 1", top_p_arr=floats(0.5, math.nan))
    yield values(r"min_p_arr must be in \[0, 1\], got -0.25 at 0; pass 0", min_p_arr=floats(-0.25, 0.5))
    yield values(r"temperature_arr must be numbers >= 0, got -1 at 1; pass 0", temperature_arr=floats(1.0, -1.0))
    rows = torch.tensor([0, 2], device=device)
    yield values(r"indices must be in \[0, 2\), got 2 at 1; pass", indices=rows)
    yield values(r"indices must be in \[0, 2\), got -1 at 0; pass", indices=rows.int() - 1)


def _cost(logits, uniform, *rest, indices=None, **options):
    """One read of each row; a subtraction, a multiplication, an exponential (8) and a sum for each logit."""
    batch = uniform.numel()
    return Cost(bytes=logits.nbytes + 12 * batch, flops=11 * batch * logits.shape[1])


@op(_SCHEMA, fake=_fake, samples=_samples, errors=_errors, cost=_cost, exact=True)
def top_k_top_p_sampling_from_logits(
    logits,
    uniform,
    top_k_arr=None,
    top_k=0,
    top_p_arr=None,
    top_p=1.0,
    min_p_arr=None,
    min_p=0.0,
    temperature_arr=None,
    temperature=1.0,
    indices=None,
    *,
    top_k_first=True,
    top_k_ties="exact",
):
    """Draw one token for each entry of `uniform`: inverse CDF, in the order of the ids, over the tokens that are kept.

    The token is the first kept one whose cumulative weight exceeds `uniform * total`. Filters (an `_arr [batch]`
    overrides its scalar): top_k keeps the k largest (<= 0 or >= vocab_size: all; ties by `top_k_ties`: "exact" keeps k
    tokens, lowest ids first, "threshold" all that equal the k-th); min_p keeps `p >= min_p * max(p)`; top_p keeps the
    smallest prefix, in descending order, whose mass reaches top_p, at least one token. With `top_k_first` the mass is
    that of what top-k and min-p left, else that of the whole row. temperature 0 and top_p 0 are argmax (lowest id on
    ties).

    Returns `(samples, valid)`, both `[batch]`: samples int32 or of indices' dtype; rows that have NaN or no token with
    a positive probability are id 0 and valid False.
    """
    if indices is not None:
        logits = logits[indices.long()]
    probs = kept_probs(
        logits,
        top_k if top_k_arr is None else top_k_arr,
        top_p if top_p_arr is None else top_p_arr,
        min_p if min_p_arr is None else min_p_arr,
        temperature if temperature_arr is None else temperature_arr,
        top_k_first=top_k_first,
        top_k_ties=top_k_ties,
    )
    valid = ~probs.isnan().any(-1)
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    token = (cdf <= uniform.reshape(-1, 1).double() * total).sum(-1)
    last = (probs > 0).long().mul(torch.arange(1, logits.shape[1] + 1, device=logits.device)).amax(-1) - 1
    samples = torch.where(valid, torch.minimum(token, last), 0)
    return samples.to(torch.int32 if indices is None else indices.dtype), valid
