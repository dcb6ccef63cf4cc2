"""What the sampler tests compare: the distribution that stock torch draws from, and the one that a rewritten graph does."""

from __future__ import annotations

import math

import inductor_capture
import torch
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
FI = torch.ops.fi


class _Recorder(torch.fx.Interpreter):
    """Runs a graph, and notes what its draws draw from."""

    def __init__(self, module, drawn):
        super().__init__(module)
        self.drawn = drawn

    def call_function(self, target, args, kwargs):
        if target is FI.top_k_top_p_sampling_from_logits.default:
            self.drawn.append(FI.top_k_top_p_softmax(args[0], **kwargs))
        elif target is FI.sampling_from_probs.default:
            self.drawn.append(args[0])
        return super().call_function(target, args, kwargs)


def distributions(monkeypatch, fn, *inputs, **options):
    """(capture, probabilities [rows, vocab_size] in float64 of each rewritten draw) of `fn` compiled and run once."""
    drawn: list[torch.Tensor] = []
    with monkeypatch.context() as patch:
        patch.setattr(inductor_capture, "make_boxed_func", lambda gm: make_boxed_func(_Recorder(gm, drawn).run))
        result = inductor_capture.capture(fn, *inputs, **options)
    return result, [p.double() / p.double().sum(-1, keepdim=True) for p in drawn]


class _Draws(TorchDispatchMode):
    """In eager code, what draws draw from. Noise is a constant meanwhile: exponential 1, Gumbel about 0."""

    def __init__(self):
        super().__init__()
        self.weights: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten.multinomial.default:
            self.weights.append(args[0])
        out = func(*args, **kwargs)
        if func is aten.exponential_.default:
            return out.fill_(1.0)
        if func in (aten.rand.default, aten.rand_like.default, aten.uniform_.default):
            return out.fill_(math.exp(-1))
        if func in (aten.argmax.default, aten.max.dim):
            self.weights.append(args[0])
        return out


def stock_probabilities(fn, *inputs, of_scores: bool = False) -> torch.Tensor:
    """[rows, vocab_size] in float64 of the last draw of `fn` in eager mode; `of_scores` if it is a Gumbel-max."""
    with _Draws() as draws:
        fn(*inputs)
    weights = draws.weights[-1].double()
    weights = weights.reshape(-1, weights.shape[-1])
    return weights.softmax(-1) if of_scores else weights / weights.sum(-1, keepdim=True)


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> tuple[float, int]:
    """(statistic, degrees of freedom) of counts against probabilities; tokens expected fewer than 10 times are one class."""
    expected = probs * counts.sum()
    rare = expected < 10
    statistic = ((counts - expected) ** 2 / expected)[~rare].sum()
    pooled = expected[rare].sum()
    if pooled >= 10:
        statistic = statistic + (counts[rare].sum() - pooled) ** 2 / pooled
    return float(statistic), int((~rare).sum()) + int(pooled >= 10) - 1


def chi_square_limit(freedom: int, false_alarm: float = 1e-6) -> float:
    """The quantile that a right sampler exceeds with probability `false_alarm` (Wilson and Hilferty's, good to 1%)."""
    z = math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - 2 * false_alarm, dtype=torch.float64)))
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3 if freedom else 1e-9


def check_draws(tokens: torch.Tensor, probs: torch.Tensor) -> None:
    """Tokens of one distribution: none that is not kept, all that come up often enough, in the right shares."""
    counts = torch.bincount(tokens.flatten().long().cpu(), minlength=probs.numel()).double()
    assert counts.numel() == probs.numel(), f"token {counts.numel() - 1} of {probs.numel()}"
    assert (counts[probs == 0] == 0).all(), f"removed tokens were drawn: {((probs == 0) & (counts > 0)).nonzero()}"
    assert (counts[probs * counts.sum() > 30] > 0).all()
    statistic, freedom = chi_square(counts, probs)
    assert statistic <= chi_square_limit(freedom), (statistic, freedom)
