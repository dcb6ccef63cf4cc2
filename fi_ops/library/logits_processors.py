"""What servers do to logits before they sample: bias, penalties for seen tokens, an allowed-token mask; one pass.

logits `[batch, vocab_size]` (last dim contiguous). Computed in float32, rounded once to logits' dtype.
"""

from __future__ import annotations

import math

import torch

from ._checks import check, check_dtype, check_last_dim_contiguous, check_same_device, check_shape
from ._reference import accumulate_dtype
from ._sampling import check_per_row, check_rows
from ._spec import FLOATS, Cost, ErrorSample, Sample, op

_NAME = "apply_logits_processors"
_SCHEMA = (
    "(Tensor logits, Tensor? output_counts=None, Tensor? prompt_mask=None, "
    "Tensor? repetition_penalty_arr=None, float repetition_penalty=1.0, "
    "Tensor? presence_penalty_arr=None, float presence_penalty=0.0, "
    "Tensor? frequency_penalty_arr=None, float frequency_penalty=0.0, "
    "Tensor? logit_bias=None, Tensor? bitmask=None) -> Tensor"
)


def _check_penalty(arg: str, array: torch.Tensor | None, number: float, has_counts: bool) -> None:
    check(_NAME, -math.inf < number < math.inf, lambda: f"{arg} must be a number, got {number:g}; pass 0 for none")
    check(
        _NAME,
        has_counts or (array is None and number == 0),
        lambda: f"output_counts must come with {arg}, got none; pass how often each token was generated",
    )


def _fake(
    logits,
    output_counts=None,
    prompt_mask=None,
    repetition_penalty_arr=None,
    repetition_penalty=1.0,
    presence_penalty_arr=None,
    presence_penalty=0.0,
    frequency_penalty_arr=None,
    frequency_penalty=0.0,
    logit_bias=None,
    bitmask=None,
):
    check_rows(_NAME, "logits", logits, FLOATS)
    batch, vocab = logits.shape

    def check_table(arg, t, dtype, shape, layout):
        if t is not None:
            check_same_device(_NAME, arg, t, "logits", logits)
            check_dtype(_NAME, arg, t, (dtype,))
            check_shape(_NAME, arg, t, shape, layout)
            check_last_dim_contiguous(_NAME, arg, t)

    check_table("output_counts", output_counts, torch.int32, (batch, vocab), "[batch, vocab_size]")
    check_table("prompt_mask", prompt_mask, torch.bool, (batch, vocab), "[batch, vocab_size]")
    arrays = {
        "repetition_penalty": (repetition_penalty_arr, repetition_penalty),
        "presence_penalty": (presence_penalty_arr, presence_penalty),
        "frequency_penalty": (frequency_penalty_arr, frequency_penalty),
    }
    for arg, (array, _) in arrays.items():
        check_per_row(_NAME, f"{arg}_arr", array, (torch.float32,), "logits", logits, batch)
    check(
        _NAME,
        0 < repetition_penalty < math.inf,
        lambda: f"repetition_penalty must be a number > 0, got {repetition_penalty:g}; pass 1 for none",
    )
    for arg in ("presence_penalty", "frequency_penalty"):
        _check_penalty(arg, *arrays[arg], output_counts is not None)
    check(
        _NAME,
        output_counts is not None
        or prompt_mask is not None
        or (repetition_penalty_arr is None and repetition_penalty == 1),
        lambda: "output_counts or prompt_mask must come with repetition_penalty, got neither; pass one or both",
    )
    row_or_rows = logit_bias is not None and logit_bias.dim() == 1
    layout = "[vocab_size] or [batch, vocab_size]"
    check_table("logit_bias", logit_bias, torch.float32, (vocab,) if row_or_rows else (batch, vocab), layout)
    check_table("bitmask", bitmask, torch.int32, (batch, (vocab + 31) // 32), "[batch, ceil(vocab_size / 32)]")
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _samples(device, dtype):
    generator = torch.Generator().manual_seed(23)

    def logits(*shape):
        return (torch.randn(*shape, generator=generator) * 3).to(dtype)

    def counts(*shape):
        return torch.randint(-6, 4, shape, generator=generator).clamp_min(0).int()

    def seen(*shape):
        return torch.rand(*shape, generator=generator) < 0.2

    def per_row(batch, low, high):
        return torch.rand(batch, generator=generator) * (high - low) + low

    def bias(*shape):
        return torch.randn(*shape, generator=generator)

    def bits(batch, vocab):
        shape = (batch, (vocab + 31) // 32)
        return torch.randint(-(2**31), 2**31, shape, generator=generator).int()

    def sample(name, x, **options):
        return Sample((x,), options, name).map_tensors(lambda t: t.to(device))

    for shape in ((4, 1000), (3, 97), (1, 33_001), (0, 10), (5, 1), (2, 32), (2, 33)):
        batch, vocab = shape
        penalties = {
            "output_counts": counts(*shape),
            "prompt_mask": seen(*shape),
            "repetition_penalty_arr": per_row(batch, 0.5, 2.0),
            "presence_penalty_arr": per_row(batch, -1.0, 1.0),
            "frequency_penalty_arr": per_row(batch, -1.0, 1.0),
        }
        yield sample("every penalty", logits(*shape), **penalties)
        yield sample(
            "everything, one bias for all", logits(*shape), **penalties, logit_bias=bias(vocab), bitmask=bits(*shape)
        )
        yield sample("everything", logits(*shape), **penalties, logit_bias=bias(*shape), bitmask=bits(*shape))
        yield sample("nothing", logits(*shape))
        yield sample("repetition of the prompt", logits(*shape), prompt_mask=seen(*shape), repetition_penalty=1.3)
        numbers = {"repetition_penalty": 0.8, "presence_penalty": 0.5, "frequency_penalty": -0.25}
        yield sample("numbers", logits(*shape), output_counts=counts(*shape), **numbers)
        yield sample("presence alone", logits(*shape), output_counts=counts(*shape), presence_penalty=1.5)
        yield sample("bitmask alone", logits(*shape), bitmask=bits(*shape))
        yield sample("bias alone", logits(*shape), logit_bias=bias(vocab))
    strided = {"output_counts": counts(6, 512)[::2, 5:305], "prompt_mask": seen(6, 512)[::2, 7:307]}
    strided |= {"logit_bias": bias(3, 400)[:, :300], "bitmask": bits(3, 640)[:, 3:13]}
    yield sample("strided", logits(6, 512)[::2, :300], **strided, repetition_penalty=1.2, frequency_penalty=0.1)
    shared = {"bitmask": bits(1, 300).expand(3, -1), "repetition_penalty_arr": torch.tensor([1.7]).expand(3)}
    yield sample("expanded", logits(3, 300), output_counts=counts(1, 300).expand(3, -1), **shared)
    special = logits(3, 100)
    special[0, 3], special[0, 50:60], special[1, ::3], special[2] = math.nan, math.inf, -math.inf, -math.inf
    yield sample(
        "special values",
        special,
        output_counts=counts(3, 100),
        repetition_penalty=1.5,
        presence_penalty=0.5,
        bitmask=bits(3, 100),
    )
    few = torch.where(bias(100) > 1, -math.inf, 0.0)
    yield sample("a bias that forbids", logits(3, 100), logit_bias=few)


def _errors(device):
    x = torch.rand(2, 40, device=device)
    counts, mask, u = torch.zeros(2, 40, dtype=torch.int32, device=device), x > 0.5, torch.rand(2, device=device) + 1

    def error(match, needs_values=False, **options):
        return ErrorSample((x,), match, options, needs_values)

    yield ErrorSample((x.double(),), r"logits must be float32, bfloat16 or float16, got float64; convert")
    yield ErrorSample((x[0],), r"logits must be \[rows, vocab_size\], got \[40\]; reshape it to 2 dimensions")
    yield error(r"output_counts must be int32, got int64; convert", output_counts=counts.long())
    yield error(
        r"output_counts must be \[batch, vocab_size\] = \[2, 40\], got \[1, 40\]; check", output_counts=counts[:1]
    )
    yield error(r"prompt_mask must be bool, got int32; convert", prompt_mask=counts)
    yield error(
        r"prompt_mask must have a contiguous last dimension, got strides \[1, 2\]",
        prompt_mask=mask.t().contiguous().t(),
    )
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        array = f"{name}_arr"
        yield error(rf"{array} must be float32, got float64; convert", output_counts=counts, **{array: u.double()})
        yield error(rf"{array} must be \[batch\] = \[2\], got \[1\]", output_counts=counts, **{array: u[:1]})
    yield error(r"repetition_penalty must be a number > 0, got 0; pass 1", output_counts=counts, repetition_penalty=0.0)
    yield error(
        r"repetition_penalty must be a number > 0, got nan; pass 1", output_counts=counts, repetition_penalty=math.nan
    )
    for name in ("presence_penalty", "frequency_penalty"):
        yield error(rf"{name} must be a number, got nan; pass 0", output_counts=counts, **{name: math.nan})
        yield error(rf"output_counts must come with {name}, got none; pass", **{name: 0.5})
        yield error(rf"output_counts must come with {name}, got none; pass", prompt_mask=mask, **{f"{name}_arr": u})
    text = r"output_counts or prompt_mask must come with repetition_penalty, got neither; pass"
    yield error(text, repetition_penalty=1.5)
    yield error(text, repetition_penalty_arr=u)
    yield error(
        r"logit_bias must be \[vocab_size\] or \[batch, vocab_size\] = \[40\], got \[39\]", logit_bias=x[0, :39]
    )
    yield error(
        r"logit_bias must be \[vocab_size\] or \[batch, vocab_size\] = \[2, 40\], got \[1, 40\]", logit_bias=x[:1]
    )
    yield error(r"logit_bias must be float32, got bfloat16", logit_bias=x[0].bfloat16())
    yield error(r"bitmask must be \[batch, ceil\(vocab_size / 32\)\] = \[2, 2\], got \[2, 40\]; check", bitmask=counts)
    yield error(r"bitmask must be int32, got int64", bitmask=counts[:, :2].long())

    def floats(*numbers):
        return torch.tensor(numbers, device=device)

    text = r"repetition_penalty_arr must be numbers > 0, got 0 at 1; pass 1 for none"
    yield error(text, True, output_counts=counts, repetition_penalty_arr=floats(1.0, 0.0))
    text = r"frequency_penalty_arr must be numbers, got nan at 0; pass 0 for none"
    yield error(text, True, output_counts=counts, frequency_penalty_arr=floats(math.nan, 0.0))
    text = r"presence_penalty_arr must be numbers, got inf at 1; pass 0 for none"
    yield error(text, True, output_counts=counts, presence_penalty_arr=floats(1.0, math.inf))


def _cost(logits, output_counts=None, prompt_mask=None, *numbers, logit_bias=None, bitmask=None, **options):
    tables = (output_counts, prompt_mask, logit_bias, bitmask)
    return Cost(bytes=2 * logits.nbytes + sum(t.nbytes for t in tables if t is not None), flops=8 * logits.numel())


@op(_SCHEMA, fake=_fake, samples=_samples, errors=_errors, cost=_cost)
def apply_logits_processors(
    logits,
    output_counts=None,
    prompt_mask=None,
    repetition_penalty_arr=None,
    repetition_penalty=1.0,
    presence_penalty_arr=None,
    presence_penalty=0.0,
    frequency_penalty_arr=None,
    frequency_penalty=0.0,
    logit_bias=None,
    bitmask=None,
):
    """Logits after bias, repetition, frequency and presence penalty and an allowed-token mask, in this order.

    `output_counts` int32 `[batch, vocab_size]`: how often each token was generated; `prompt_mask` bool `[batch,
    vocab_size]`: whether the prompt has it. Repetition (> 0): the logit of a token in either is divided by the penalty
    where positive, else multiplied with it; frequency is subtracted times the output count, presence once where that is
    > 0 (an `_arr [batch]` float32 overrides each number). `logit_bias` float32 `[vocab_size]` or `[batch, vocab_size]`
    is added first. `bitmask` int32 `[batch, ceil(vocab_size / 32)]`: token t stays where bit t % 32 of word t // 32 is
    set, else it is -inf. The meaning of vLLM and Hugging Face.
    """

    def column(array, number):
        return number if array is None else array.to(accumulate_dtype(logits))[:, None]

    x = logits.to(accumulate_dtype(logits))
    if logit_bias is not None:
        x = x + logit_bias.to(x.dtype)
    count = torch.zeros_like(logits, dtype=torch.int32) if output_counts is None else output_counts
    seen = count > 0 if prompt_mask is None else (count > 0) | prompt_mask
    repetition = column(repetition_penalty_arr, repetition_penalty)
    x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
    x = x - column(frequency_penalty_arr, frequency_penalty) * count
    x = x - column(presence_penalty_arr, presence_penalty) * (count > 0)
    if bitmask is not None:
        token = torch.arange(logits.shape[1], device=logits.device)
        x = torch.where((bitmask[:, token // 32] >> (token % 32)) & 1 == 1, x, -math.inf)
    return x.to(logits.dtype)
