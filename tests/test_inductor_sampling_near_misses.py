"""Code that is almost a filter: whatever is taken of it, the distribution is that of the code as it stands.

Each case says what may be taken; a recogniser that takes more changes the distribution of the case's logits.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sampler_oracle import distributions, stock_probabilities
from snippets.samplers import INF, multinomial, top_k_mask
from test_inductor_sampling import distinct_logits, sampler_pieces

CASES: dict[str, tuple] = {}


def taken(*pieces):
    def register(fn):
        CASES[fn.__name__] = fn, pieces
        return fn

    return register


def removed(x, remove):
    return multinomial(x.masked_fill(remove, -INF))


def put_back(remove, ids):
    return remove.scatter(1, ids, remove)


def drawn(weights):
    return torch.multinomial(weights / weights.sum(-1, keepdim=True), 1)


# ---- top-k ----


@taken()
def kth_of_another_row(x):
    return removed(x, x < x.flip(0).topk(5).values[:, -1:])


@taken()
def kth_of_the_first_row(x):
    return removed(x, x < x[:1].topk(5).values[:, -1:])


@taken()
def kth_along_the_batch(x):
    return removed(x, x < x.topk(2, dim=0).values[-1:])


@taken()
def only_what_is_above_the_kth(x):
    return multinomial(torch.where(x > x.topk(5).values[:, -1:], x, -INF))


@taken()
def the_top_k_removed(x):
    return multinomial(torch.where(x < x.topk(5).values[:, -1:], x, -INF))


@taken()
def sorted_again_instead_of_put_back(x):
    ordered, ids = x.sort(-1)
    return multinomial(ordered.masked_fill(ordered < ordered[:, -5:-4], -INF).gather(-1, ids))


@taken()
def put_back_in_reverse(x):
    ordered, ids = x.sort(-1)
    ordered = ordered.masked_fill(ordered < ordered[:, -5:-4], -INF)
    return multinomial(ordered.gather(-1, ids.argsort(-1, descending=True)))


@taken()
def added_into_place(x):
    ordered, ids = x.sort(-1)
    ordered = ordered.masked_fill(ordered < ordered[:, -9:-8], -INF)
    return multinomial(torch.zeros_like(x).scatter_add(-1, ids, ordered))


@taken()
def two_top_ks_in_sorted_order(x):
    ordered, ids = x.sort(-1)
    for k in (9, 4):
        ordered = ordered.masked_fill(ordered < ordered[:, x.shape[1] - k, None], -INF)
    return multinomial(ordered.scatter(-1, ids, ordered))


@taken()
def smallest_of_all(x):
    values, ids = x.topk(9, largest=False)
    return ids.gather(-1, torch.multinomial(values.softmax(-1), 1))


# ---- top-p ----


@taken()
def mass_of_unsorted_tokens(x):
    remove = x.softmax(-1).cumsum(-1) <= 0.1
    remove[:, -1] = False
    return removed(x, put_back(remove, x.sort(-1).indices))


@taken()
def most_probable_tokens_removed(x):
    ordered, ids = x.sort(-1)
    remove = ordered.softmax(-1).cumsum(-1) > 0.5
    remove[:, -1] = False
    return removed(x, put_back(remove, ids))


@taken()
def ascending_rule_in_descending_order(x):
    ordered, ids = x.sort(-1, descending=True)
    remove = ordered.softmax(-1).cumsum(-1) <= 0.1
    remove[:, 0] = False
    return removed(x, put_back(remove, ids))


@taken()
def mass_at_another_temperature(x):
    ordered, ids = x.sort(-1)
    remove = (ordered / 0.5).softmax(-1).cumsum(-1) <= 0.1
    remove[:, -1] = False
    return removed(x, put_back(remove, ids))


@taken()
def sorted_probabilities_at_another_temperature(x):
    ordered, ids = (x / 0.5).softmax(-1).sort(-1, descending=True)
    return removed(x, put_back(ordered.cumsum(-1) - ordered > 0.9, ids))


@taken()
def moved_on_by_two(x):
    ordered, ids = x.sort(-1, descending=True)
    remove = ordered.softmax(-1).cumsum(-1) > 0.9
    remove[:, 2:] = remove[:, :-2].clone()
    remove[:, :2] = False
    return removed(x, put_back(remove, ids))


@taken()
def moved_on_and_the_first_not_kept(x):
    ordered, ids = x.sort(-1, descending=True)
    remove = F.pad((ordered.softmax(-1).cumsum(-1) > 0.9)[:, :-1], (1, 0), value=True)
    return removed(x, put_back(remove, ids))


@taken()
def two_kept_at_least(x):
    ordered, ids = x.sort(-1, descending=True)
    probs = ordered.softmax(-1)
    remove = probs.cumsum(-1) - probs > 0.1
    remove[:, :2] = False
    return removed(x, put_back(remove, ids))


@taken()
def the_token_itself_taken_off_twice(x):
    ordered, ids = x.sort(-1, descending=True)
    probs = ordered.softmax(-1)
    return removed(x, put_back(probs.cumsum(-1) - probs - probs > 0.5, ids))


@taken()
def another_token_taken_off(x):
    ordered, ids = x.sort(-1, descending=True)
    probs = ordered.softmax(-1)
    remove = probs.cumsum(-1) - probs.flip(-1) > 0.5
    remove[:, 0] = False
    return removed(x, put_back(remove, ids))


@taken()
def mass_before_the_top_k(x):
    """Top-p looks at the logits from before the top-k: it is no filter of what is left."""
    ordered, ids = x.sort(-1)
    remove = ordered.softmax(-1).cumsum(-1) <= 0.3
    remove[:, -1] = False
    return removed(top_k_mask(x, 9), put_back(remove, ids))


@taken()
def two_top_ps_in_sorted_order(x):
    ordered, ids = x.sort(-1)
    for mass in (0.2, 0.3):
        remove = ordered.softmax(-1).cumsum(-1) <= mass
        remove[:, -1] = False
        ordered = ordered.masked_fill(remove, -INF)
    return multinomial(ordered.scatter(-1, ids, ordered))


@taken()
def mass_of_weights_that_sum_to_half(x):
    probs = x.softmax(-1) * 0.5
    ordered, ids = probs.sort(-1, descending=True)
    return drawn(probs.masked_fill(put_back(ordered.cumsum(-1) - ordered > 0.3, ids), 0.0))


@taken()
def mass_of_what_a_top_k_left_not_normalised(x):
    probs = x.softmax(-1)
    probs = torch.where(probs < probs.topk(9).values[:, -1:], 0.0, probs)
    ordered, ids = probs.sort(-1, descending=True)
    return drawn(probs.masked_fill(put_back(ordered.cumsum(-1) - ordered > 0.6, ids), 0.0))


@taken("top-k", "top-p")
def mass_of_what_a_top_k_left_normalised(x):
    probs = x.softmax(-1)
    probs = torch.where(probs < probs.topk(9).values[:, -1:], 0.0, probs)
    probs = probs / probs.sum(-1, keepdim=True)
    ordered, ids = probs.sort(-1, descending=True)
    return drawn(probs.masked_fill(put_back(ordered.cumsum(-1) - ordered > 0.6, ids), 0.0))


@taken()
def place_looked_up_in_another_order(x):
    ids = x.flip(-1).sort(-1, descending=True).indices
    probs = x.softmax(-1)
    return ids.gather(-1, drawn(torch.where(probs.cumsum(-1) - probs > 0.9, 0.0, probs)))


@taken()
def sorted_place_looked_up_in_another_order(x):
    ids = x.flip(-1).sort(-1, descending=True).indices
    probs = x.sort(-1, descending=True).values.softmax(-1)
    return ids.gather(-1, drawn(torch.where(probs.cumsum(-1) - probs > 0.9, 0.0, probs)))


@taken()
def place_not_looked_up(x):
    probs = x.sort(-1, descending=True).values.softmax(-1)
    return drawn(torch.where(probs.cumsum(-1) - probs > 0.9, 0.0, probs))


# ---- min-p ----


@taken()
def most_probable_of_another_row(x):
    probs = x.softmax(-1)
    return removed(x, probs < 0.1 * probs.flip(0).amax(-1, keepdim=True))


@taken()
def most_probable_of_all_rows(x):
    probs = x.softmax(-1)
    return removed(x, probs < 0.1 * probs.amax())


@taken()
def equal_to_the_threshold_removed_too(x):
    probs = x.softmax(-1)
    return removed(x, probs <= 0.1 * probs.amax(-1, keepdim=True))


@taken()
def two_filters_in_one_mask(x):
    probs = x.softmax(-1)
    return removed(x, (x < x.topk(9).values[:, -1:]) | (probs < 0.2 * probs.amax(-1, keepdim=True)))


# ---- temperature, and the same distribution ----


@taken("top-k")
def below_zero(x):
    return multinomial(top_k_mask(x / -0.7))


@taken("temperature")
def a_temperature_made_of_the_row(x):
    return multinomial(x / x.abs().amax(-1, keepdim=True))


@taken("temperature")
def moved_by_row(x):
    return multinomial((x - x.mean(-1, keepdim=True)) / 0.6)


@taken()
def moved_by_token(x):
    return multinomial(x - x.mean(0, keepdim=True))


@taken("temperature", "top-k")
def cooled_twice(x):
    return multinomial(top_k_mask(x / 0.5) / 0.6)


@taken()
def squared_probabilities(x):
    return drawn(x.softmax(-1) ** 2)


@pytest.mark.parametrize("name", CASES)
def test_near_miss(name, monkeypatch):
    fn, pieces = CASES[name]
    x = distinct_logits(step=1 / 8)
    result, ours = distributions(monkeypatch, fn, x)
    assert not any("internal error" in r for r in result.reasons()), result.reasons()
    assert sampler_pieces(result) == [("multinomial", *pieces)]
    torch.testing.assert_close(ours[0], stock_probabilities(fn, x.double()), rtol=1e-4, atol=1e-9)


def test_noise_in_half_precision(monkeypatch):
    """Whatever stock's noise is rounded to, ours are draws from the softmax of the logits."""
    for dtype in (torch.bfloat16, torch.float16):
        for fn in (
            lambda x: (x - (-torch.rand_like(x).log()).log()).argmax(-1),
            lambda x: (x.softmax(-1) / torch.empty_like(x).exponential_()).argmax(-1),
        ):
            x = distinct_logits(dtype=dtype)
            result, ours = distributions(monkeypatch, fn, x)
            assert len(sampler_pieces(result)) == 1
            torch.testing.assert_close(ours[0], x.double().softmax(-1), rtol=2e-5, atol=1e-9)
