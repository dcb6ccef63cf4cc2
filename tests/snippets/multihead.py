"""`F.multi_head_attention_forward` and the modules of torch.nn around it, in eval mode. Sequences come first: [L, B, C]."""

import torch
import torch.nn.functional as F

from . import snippet
from .sdpa import B, D, H, L

C = H * D


def weights():
    return torch.randn(3 * C, C) / 8, torch.randn(3 * C), torch.randn(C, C) / 8, torch.randn(C)


def sequence():
    return torch.randn(L, B, C), *weights()


def multihead(x, w_in, b_in, w_out, b_out, **options):
    return F.multi_head_attention_forward(
        x, x, x, C, H, w_in, b_in, None, None, False, 0.0, w_out, b_out, training=False, **options
    )


@snippet(sequence)
def functional(x, *w):
    return multihead(x, *w, need_weights=False)[0]


@snippet(sequence)
def functional_causal(x, *w):
    mask = torch.full((L, L), -torch.inf, dtype=x.dtype, device=x.device).triu(1)
    return multihead(x, *w, need_weights=False, attn_mask=mask, is_causal=True)[0]


@snippet(sequence)
def functional_with_padding(x, *w):
    ignored = torch.arange(L, device=x.device)[None] >= torch.tensor([[L], [L - 2]], device=x.device)
    mask = torch.full((L, L), -torch.inf, dtype=x.dtype, device=x.device).triu(1)
    ignored = torch.zeros_like(ignored, dtype=x.dtype).masked_fill(ignored, -torch.inf)
    return multihead(x, *w, need_weights=False, attn_mask=mask, key_padding_mask=ignored)[0]


@snippet(sequence)
def weights_not_looked_at(x, *w):
    """With weights to be returned, torch multiplies [B * H, L, D] that were never [B, H, L, D]."""
    return multihead(x, *w, need_weights=True)[0]


@snippet(sequence)
def weights_not_looked_at_causal(x, *w):
    mask = torch.full((L, L), -torch.inf, dtype=x.dtype, device=x.device).triu(1)
    return multihead(x, *w, need_weights=True, attn_mask=mask)[0]


@snippet(sequence, grade="", reason="weights are used elsewhere")
def weights_returned(x, *w):
    return multihead(x, *w, need_weights=True)


def of_module(module, count=1):
    """A module's input, and its parameters as inputs too, so that they come in any dtype."""
    return lambda: (*(torch.randn(B, L, C) for _ in range(count)), *(p.detach().clone() for p in module.parameters()))


def call(module, parameters, *args, **kwargs):
    names = [name for name, _ in module.named_parameters()]
    return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), args, kwargs)


ATTENTION = torch.nn.MultiheadAttention(C, H, batch_first=True).eval()
LAYER = torch.nn.TransformerEncoderLayer(C, H, 2 * C, batch_first=True).eval()
SLOW_LAYER = torch.nn.TransformerEncoderLayer(C, H, 2 * C, batch_first=True, activation=F.silu).eval()
DECODER = torch.nn.TransformerDecoderLayer(C, H, 2 * C, batch_first=True).eval()


@snippet(of_module(ATTENTION))
def module(x, *parameters):
    return call(ATTENTION, parameters, x, x, x, need_weights=False)[0]


@snippet(of_module(ATTENTION))
def module_weights_not_looked_at(x, *parameters):
    return call(ATTENTION, parameters, x, x, x)[0]


@snippet(of_module(ATTENTION), grade="", reason="weights are used elsewhere")
def module_weights_returned(x, *parameters):
    return call(ATTENTION, parameters, x, x, x)


@snippet(of_module(ATTENTION, 2))
def module_across(x, memory, *parameters):
    return call(ATTENTION, parameters, x, memory, memory, need_weights=False)[0]


@snippet(of_module(LAYER), grade=None)
def encoder_layer(x, *parameters):
    """torch's fast path: the whole layer is one op, which is no site."""
    return call(LAYER, parameters, x)


@snippet(of_module(SLOW_LAYER))
def encoder_layer_without_fast_path(x, *parameters):
    return call(SLOW_LAYER, parameters, x)


@snippet(of_module(SLOW_LAYER))
def encoder_layer_causal(x, *parameters):
    mask = torch.nn.Transformer.generate_square_subsequent_mask(L, x.device, x.dtype)
    return call(SLOW_LAYER, parameters, x, src_mask=mask, is_causal=True)


@snippet(of_module(DECODER, 2))
def decoder_layer(x, memory, *parameters):
    return call(DECODER, parameters, x, memory)
