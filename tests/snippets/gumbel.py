"""The largest of noisy logits: Gumbel-max, and `torch.distributions`."""

import torch
import torch.nn.functional as F

from .samplers import FROM_PROBS, sure, top_k_mask, top_p_mask


@sure("gumbel trick")
def exponential_trick_at_rate_one(x):
    """What Inductor makes of the exponential trick at rate 1.0."""
    noise = torch.empty_like(x).exponential_(1.0)
    return torch.argmax(F.softmax(x, dim=-1) / noise, dim=-1, keepdim=True)


@sure("gumbel trick", "temperature")
def two_logarithms(x):
    return torch.argmax(x / 0.7 - torch.log(-torch.log(torch.rand_like(x))), dim=-1)


@sure("gumbel trick", "temperature", "top-k")
def two_logarithms_with_eps(x):
    u = torch.rand_like(x)
    noise = -torch.log(-torch.log(u + 1e-20) + 1e-20)
    return (top_k_mask(x / 0.7) + noise).argmax(-1, keepdim=True)


@sure("gumbel trick", "top-p")
def clamped(x):
    u = torch.rand_like(x).clamp_(1e-10, 1 - 1e-7)
    return (top_p_mask(x) + -(-u.log()).log()).argmax(-1)


@sure("gumbel trick")
def clamped_below(x):
    u = torch.rand(x.shape, device=x.device).clamp_min(1e-9)
    return (-(-u.log()).clamp_min(1e-9).log() + x).max(-1).indices


@sure("gumbel trick")
def scaled_uniform_and_sum(x):
    """What scales the logits and the noise alike is no temperature."""
    u = torch.rand_like(x) * (1 - 2e-7) + 1e-7
    return ((x - (-u.log()).log()) / 0.5).softmax(-1).argmax(-1)


@sure("gumbel trick")
def complement_of_uniform(x):
    return (x - (-(1 - torch.rand_like(x)).log()).log()).argmax(-1)


@sure("gumbel trick")
def logarithm_of_exponential(x):
    return (x.log_softmax(-1) - torch.empty_like(x).exponential_().log()).argmax(-1)


@sure("gumbel trick")
def logarithm_of_probabilities(x):
    return (torch.log(x.softmax(-1)) - torch.empty_like(x).exponential_(2.0).log()).argmax(-1)


@sure("gumbel trick")
def largest_and_its_index(x):
    return (x - torch.empty_like(x).exponential_().log()).max(-1)[1]


@sure("gumbel trick")
def uniform_in_place(x):
    noise = torch.zeros_like(x).uniform_(1e-10, 1.0)
    return (x - (-noise.log()).log()).argmax(-1)


@sure("gumbel trick")
def torch_gumbel(x):
    noise = torch.distributions.Gumbel(torch.zeros_like(x), torch.ones_like(x), validate_args=False).sample()
    return (x + noise).argmax(-1)


@sure("gumbel trick")
def gumbel_softmax(x):
    return F.gumbel_softmax(x, tau=0.5, hard=True)


@sure("gumbel trick", "top-k")
def gumbel_softmax_of_filtered(x):
    return F.gumbel_softmax(top_k_mask(x), hard=True)


@sure("multinomial")
def categorical(x):
    return torch.distributions.Categorical(logits=x).sample()


@sure("multinomial", "temperature", "top-k")
def categorical_filtered(x):
    return torch.distributions.Categorical(logits=top_k_mask(x / 0.8)).sample()


@sure("multinomial", "top-k")
def categorical_of_probabilities(x):
    return torch.distributions.Categorical(probs=top_k_mask(x).softmax(-1), validate_args=False).sample()


@sure("multinomial")
def categorical_with_log_prob(x):
    """The normalised logits are computed anyway: the op starts from there."""
    distribution = torch.distributions.Categorical(logits=x, validate_args=False)
    action = distribution.sample()
    return action, distribution.log_prob(action)


@sure("multinomial", grade=FROM_PROBS)
def categorical_with_entropy(x):
    distribution = torch.distributions.Categorical(logits=x, validate_args=False)
    return distribution.sample(), distribution.entropy()


@sure("multinomial")
def one_hot_categorical(x):
    return F.one_hot(torch.distributions.Categorical(logits=x, validate_args=False).sample(), x.shape[-1])


# ---- near misses ----


@sure(grade=None)
def gumbel_softmax_soft(x):
    return F.gumbel_softmax(x * 100, tau=0.5)


@sure(grade="", reason="random numbers that race are used elsewhere")
def soft_and_hard(x):
    y = F.gumbel_softmax(x * 100, tau=0.5)
    return y.argmax(-1), y


@sure(grade=None)
def flattened_noise(x):
    """Noise of another scale is no Gumbel noise: it draws from another distribution."""
    return (x - 0.5 * torch.empty_like(x).exponential_().log()).argmax(-1)


@sure(grade=None)
def large_eps(x):
    return (x - torch.log(-torch.log(torch.rand_like(x) + 1e-2) + 1e-2)).argmax(-1)


@sure(grade=None)
def normal_noise(x):
    return (x + torch.randn_like(x)).argmax(-1)


@sure(grade=None)
def uniform_of_another_range(x):
    return (x - (-(torch.rand_like(x) * 0.5).log()).log()).argmax(-1)
