"""vLLM's sampler: temperature, top-k, top-p and min-p of each request, as tensors."""

import torch

from .samplers import INF, SOFTMAX_AND_DRAW, V, logits, sure


def requests():
    """Logits, and of each row temperature, k, p, m."""
    k = torch.tensor([5, V, 20], dtype=torch.int32)
    return *logits(), torch.tensor([0.7, 1.0, 1.3]), k, torch.tensor([0.9, 1.0, 0.5]), torch.tensor([0.1, 0.0, 0.3])


def random_sample(probs):
    noise = torch.empty_like(probs)
    noise.exponential_()
    return probs.div_(noise).argmax(dim=-1).view(-1)


def sample(x):
    return random_sample(x.softmax(dim=-1, dtype=torch.float32))


def apply_temperature(x, t):
    return x.div(t.unsqueeze(dim=1))


def apply_top_k_top_p(x, k, p):
    ordered, ids = x.sort(dim=-1, descending=False)
    if k is not None:
        kth = ordered.size(1) - k.to(torch.long)
        kth = ordered.gather(1, kth.unsqueeze(dim=1))
        ordered.masked_fill_(ordered < kth, -INF)
    if p is not None:
        probs = ordered.softmax(dim=-1)
        mass = torch.cumsum(probs, dim=-1, out=probs)
        remove = mass <= 1 - p.unsqueeze(dim=1)
        remove[:, -1] = False
        ordered.masked_fill_(remove, -INF)
    return ordered.scatter(dim=-1, index=ids, src=ordered)


def apply_top_k_only(x, k, max_k=None):
    """Rows of k == vocab_size are left as they are. `max_k`: a number instead of the largest k as data."""
    unlimited = k == x.shape[1]
    k = k.masked_fill(unlimited, 1)
    place = k.sub(1).unsqueeze(1)
    kth = x.topk(k.max() if max_k is None else max_k, dim=1).values.gather(1, place.long())
    kth.masked_fill_(unlimited.unsqueeze(1), -INF)
    return x.masked_fill(x < kth, -INF)


def apply_min_p(x, m):
    probs = torch.nn.functional.softmax(x, dim=-1)
    threshold = torch.amax(probs, dim=-1, keepdim=True).mul_(m.unsqueeze(1))
    x = x.clone()
    x[probs < threshold] = -INF
    return x


ALL = ("temperature", "top-k", "top-p", "min-p")


@sure("exponential trick", *ALL, inputs=requests)
def everything(x, t, k, p, m):
    return sample(apply_top_k_top_p(apply_min_p(apply_temperature(x.float(), t), m), k, p))


@sure("exponential trick", *ALL, inputs=lambda: (requests()[0].bfloat16(), *requests()[1:]))
def everything_bf16(x, t, k, p, m):
    return sample(apply_top_k_top_p(apply_min_p(apply_temperature(x.float(), t), m), k, p))


@sure("exponential trick", *ALL[:3], inputs=requests)
def top_k_and_top_p(x, t, k, p, m):
    return sample(apply_top_k_top_p(apply_temperature(x, t), k, p))


@sure("exponential trick", "temperature", "top-p", inputs=requests)
def top_p_alone(x, t, k, p, m):
    return sample(apply_top_k_top_p(apply_temperature(x, t), None, p))


@sure("exponential trick", "top-k", inputs=requests)
def top_k_by_sorting(x, t, k, p, m):
    return sample(apply_top_k_top_p(x, k, None))


@sure("exponential trick", "temperature", "top-k", inputs=requests)
def top_k_alone(x, t, k, p, m):
    return sample(apply_top_k_only(apply_temperature(x, t), k, V))


@sure("exponential trick", "temperature", "top-k", "min-p", inputs=requests)
def top_k_alone_up_to_a_bound(x, t, k, p, m):
    return sample(apply_top_k_only(apply_min_p(apply_temperature(x, t), m), k.clamp(1, 20).masked_fill(k == V, V), 20))


@sure("exponential trick", "temperature", "top-k", "top-p", grade=SOFTMAX_AND_DRAW, inputs=requests)
def probabilities_for_the_verifier(x, t, k, p, m):
    probs = apply_top_k_top_p(apply_temperature(x, t), k, p).softmax(dim=-1, dtype=torch.float32)
    return random_sample(probs.clone()), probs


@sure("exponential trick", *ALL[:3], inputs=requests)
def greedy_where_the_temperature_is_zero(x, t, k, p, m):
    t = torch.where(t < 0.8, 0.0, t)
    greedy = x.argmax(-1)
    drawn = sample(apply_top_k_top_p(apply_temperature(x, torch.where(t < 1e-5, 1.0, t)), k, p))
    return torch.where(t < 1e-5, greedy, drawn)


@sure(
    "exponential trick",
    "temperature",
    "top-k",
    "top-p",
    inputs=lambda: (*requests()[:1], *map(torch.tensor, (0.7, 5, 0.9))),
)
def one_number_for_all_rows(x, t, k, p):
    """Tensors without dimensions."""
    return sample(apply_top_k_top_p(x / t, k.expand(3), p.expand(3)))


@sure("exponential trick", "temperature", "top-k", "top-p", inputs=requests)
def one_row(x, t, k, p, m):
    return sample(apply_top_k_top_p(apply_temperature(x[:1], t[:1]), k[:1], p[:1]))


@sure("exponential trick", "top-p", inputs=requests)
def descending_with_a_p_for_each_row(x, t, k, p, m):
    ordered, ids = x.sort(-1, descending=True)
    probs = ordered.softmax(-1)
    remove = probs.cumsum(-1) - probs > p[:, None]
    return sample(x.masked_fill(torch.zeros_like(remove).scatter(1, ids, remove), -INF))


@sure("exponential trick", "top-k", inputs=requests)
def descending_with_a_k_for_each_row(x, t, k, p, m):
    kth = x.sort(-1, descending=True).values.gather(1, (k.long() - 1)[:, None])
    return sample(torch.where(x < kth, -INF, x))


# ---- near misses ----


@sure("exponential trick", inputs=requests)
def threshold_for_each_row(x, t, k, p, m):
    """A number for each row to compare with is no top-k."""
    return sample(x.masked_fill(x < t[:, None], -INF))


@sure("exponential trick", inputs=requests)
def top_p_that_differs_along_the_vocabulary(x, t, k, p, m):
    ordered, ids = x.sort(dim=-1)
    remove = ordered.softmax(-1).cumsum(-1) <= torch.linspace(0, 0.1, V, device=x.device)
    remove[:, -1] = False
    ordered = ordered.masked_fill(remove, -INF)
    return sample(ordered.scatter(-1, ids, ordered))


@sure("exponential trick", inputs=requests)
def sorted_order_left_by_another_sort(x, t, k, p, m):
    ordered, _ = x.sort(dim=-1)
    ids = (x + 1e-3 * x.flip(-1)).sort(dim=-1).indices
    ordered = ordered.masked_fill(ordered < ordered.gather(1, (V - k.long())[:, None]), -INF)
    return sample(ordered.scatter(-1, ids, ordered))


@sure("exponential trick", inputs=requests)
def temperature_for_each_token(x, t, k, p, m):
    return sample(x / torch.linspace(0.5, 1, V, device=x.device))
