"""Attention of images: fused projections, biases of relative positions, RoPE of rows and columns, cross attention to text."""

import torch
import torch.nn.functional as F

from . import snippet
from .rope import rotate_every_two, rotate_half
from .sdpa import B, D, H

ROPE = "rope + attention"
C = H * D
ROWS, COLUMNS = 3, 4
N = ROWS * COLUMNS


def fused():
    return torch.randn(B, N, C), torch.randn(3 * C, C) / 8


def split(x, weight):
    """timm: [3, B, H, N, D]"""
    length = x.shape[1]
    return F.linear(x, weight).reshape(B, length, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)


@snippet(fused)
def timm(x, weight):
    """timm, DINOv2, SigLIP"""
    q, k, v = split(x, weight)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C)


@snippet(fused)
def timm_without_sdpa(x, weight):
    q, k, v = split(x, weight)
    attn = (q * D**-0.5) @ k.transpose(-2, -1)
    return (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, N, C)


@snippet(lambda: (*fused(), torch.ones(D), torch.ones(D)))
def timm_normed(x, weight, q_weight, k_weight):
    q, k, v = split(x, weight)
    q, k = F.layer_norm(q, (D,), q_weight), F.layer_norm(k, (D,), k_weight)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C)


@snippet(lambda: (torch.randn(B, N, C), torch.randn(B, 7, C)))
def diffusers_cross_attention(x, text):
    """`AttnProcessor2_0`: the mask is none."""
    q = x.view(B, -1, H, D).transpose(1, 2)
    k, v = (t.view(B, -1, H, D).transpose(1, 2) for t in (text, text + 1))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False)
    return out.transpose(1, 2).reshape(B, -1, C).to(q.dtype)


@snippet(lambda: (torch.randn(B, N, C), torch.randn(B, 7, C)))
def diffusers_without_sdpa(x, text):
    """`AttnProcessor`: heads into the batch, and a product with nothing added."""
    q, k, v = (
        t.reshape(B, -1, H, D).permute(0, 2, 1, 3).reshape(B * H, -1, D).contiguous() for t in (x, text, text + 1)
    )
    nothing = torch.empty(B * H, N, 7, dtype=q.dtype, device=q.device)
    scores = torch.baddbmm(nothing, q, k.transpose(-1, -2), beta=0, alpha=D**-0.5)
    out = torch.bmm(scores.softmax(dim=-1), v)
    return out.reshape(B, H, -1, D).permute(0, 2, 1, 3).reshape(B, -1, C)


def with_positions():
    return *fused(), torch.randn(ROWS, ROWS, D), torch.randn(COLUMNS, COLUMNS, D)


@snippet(with_positions)
def sam_bias(x, weight, rows, columns):
    """Segment Anything: the bias is made of the query, for rows and for columns."""
    q, k, v = (t.reshape(B * H, N, D) for t in split(x, weight))
    by_rows = q.reshape(B * H, ROWS, COLUMNS, D)
    rel_h = torch.einsum("bhwc,hkc->bhwk", by_rows, rows)
    rel_w = torch.einsum("bhwc,wkc->bhwk", by_rows, columns)
    bias = (rel_h[..., :, None] + rel_w[..., None, :]).reshape(B, H, N, N)
    q, k, v = (t.view(B, H, N, D) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(B, N, C)


@snippet(lambda: (*fused(), torch.randn(49, H), torch.randint(49, (N, N))))
def swin_bias(x, weight, table, index):
    q, k, v = split(x, weight)
    bias = table[index.view(-1)].view(N, N, H).permute(2, 0, 1).contiguous().unsqueeze(0)
    attn = (q * D**-0.5) @ k.transpose(-2, -1) + bias
    return (attn.softmax(-1) @ v).transpose(1, 2).reshape(B, N, C)


def axial(x):
    """Angles [N, D / 2]: half of them by the row, half by the column."""
    frequencies = 100.0 ** (-torch.arange(0, D // 2, 2, device=x.device).to(x.dtype) / (D // 2))
    place = torch.arange(N, device=x.device)
    rows, columns = (p.to(x.dtype)[:, None] * frequencies for p in (place // COLUMNS, place % COLUMNS))
    return torch.cat((rows, columns), dim=-1)


@snippet(fused, grade=ROPE, rotated=True)
def qwen2_vl_vision(x, weight):
    """Rotated as [N, H, D], a row of cos and sin for each patch."""
    q, k, v = F.linear(x, weight).reshape(B, N, 3, H, D).unbind(2)
    embedding = torch.cat((axial(x), axial(x)), dim=-1)
    cos, sin = embedding.cos()[:, None], embedding.sin()[:, None]
    q, k = (t * cos + rotate_half(t) * sin for t in (q, k))
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).reshape(B, N, C)


@snippet(lambda: (*fused(), torch.randn(N, D), torch.randn(N, D)), grade=ROPE, rotated=True)
def eva_rope(x, weight, cos, sin):
    """Tables of full width in buffers, for interleaved pairs."""
    q, k, v = split(x, weight)
    q, k = (t * cos + rotate_every_two(t) * sin for t in (q, k))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C)


def mrope_sections():
    return torch.randn(B, H, N, D), torch.randn(B, H, N, D), torch.randn(B, H, N, D), torch.randint(50, (3, B, N))


@snippet(mrope_sections, grade=ROPE, rotated=True)
def qwen2_vl_sections(q, k, v, positions):
    """Multimodal RoPE: sections of the table follow time, row and column; [3, B, N] positions."""
    frequencies = 100.0 ** (-torch.arange(0, D, 2, device=q.device).to(q.dtype) / D)
    angles = positions[..., None].to(q.dtype) * frequencies
    embedding = torch.cat((angles, angles), dim=-1)
    sections = [2, 3, 3] * 2
    cos, sin = (
        torch.cat([part[i % 3] for i, part in enumerate(table.split(sections, dim=-1))], dim=-1).unsqueeze(1)
        for table in (embedding.cos(), embedding.sin())
    )
    q, k = (t * cos + rotate_half(t) * sin for t in (q, k))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@snippet(lambda: (*mrope_sections()[:3], torch.arange(N)), grade=ROPE, rotated=True)
def cohere(q, k, v, positions):
    """Every angle twice, interleaved, and rotated in float32."""
    frequencies = 100.0 ** (-torch.arange(0, D, 2, device=q.device).to(q.dtype) / D)
    embedding = torch.repeat_interleave(positions[None, :, None].to(q.dtype) * frequencies, 2, dim=-1)
    cos, sin = embedding.cos().unsqueeze(1), embedding.sin().unsqueeze(1)

    def turned(x):
        return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)

    q, k = (t * cos + turned(t) * sin for t in (q, k))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@snippet(lambda: (*fused()[:1], torch.randn(3 * C, C) / 8, torch.randn(B, 1, C)), reason="is not RoPE", rotated=None)
def rope_but_for_the_class_token(x, weight, token):
    """DINOv3: the first token is not rotated."""
    q, k, v = split(torch.cat((token, x), dim=1), weight)
    embedding = torch.cat((axial(x), axial(x)), dim=-1)
    cos, sin = embedding.cos(), embedding.sin()

    def rotate(t):
        first, patches = t[:, :, :1], t[:, :, 1:]
        return torch.cat((first, patches * cos + rotate_half(patches) * sin), dim=2)

    return F.scaled_dot_product_attention(rotate(q), rotate(k), v).transpose(1, 2).reshape(B, N + 1, C)


@snippet(fused, reason="is not RoPE|not the rest of the head", rotated=None)
def each_half_by_its_own_angles(x, weight):
    """ChatGLM: two rotations of half a head, whose pairs are not those of the whole."""
    q, k, v = split(x, weight)
    rows, columns = axial(x).chunk(2, dim=-1)

    def rotate(t):
        parts = []
        for part, turn in zip(t.chunk(2, dim=-1), (rows, columns), strict=True):
            table = torch.cat((turn, turn), dim=-1)
            parts.append(part * table.cos() + rotate_half(part) * table.sin())
        return torch.cat(parts, dim=-1)

    return F.scaled_dot_product_attention(rotate(q), rotate(k), v).transpose(1, 2).reshape(B, N, C)
