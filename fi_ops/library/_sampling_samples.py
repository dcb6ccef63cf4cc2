"""Samples and error samples of the ops that filter rows: one list of each, of which an op takes what it has arguments for."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ._sampling import RowOp, filters_of, kept_probs, middle_uniform
from ._spec import ErrorSample, Sample


def _ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def _floats(*values):
    return torch.tensor(values, dtype=torch.float32)


def _options() -> Iterator[tuple[str, tuple[int, int], float, dict]]:
    """(name, shape, spread of the logits, options) of random rows."""
    yield "no filter", (5, 97), 3.0, {}
    yield "typical", (4, 1000), 3.0, {"top_k": 50, "top_p": 0.83}
    yield "top-k alone", (3, 333), 3.0, {"top_k": 7}
    yield "top-p alone", (4, 2500), 1.0, {"top_p": 0.9}
    yield "min-p alone", (3, 501), 3.0, {"min_p": 0.03}
    every = {"top_k": 90, "top_p": 0.93, "min_p": 0.011, "temperature": 0.7}
    yield "every filter", (4, 700), 3.0, every
    yield "every filter, min-p first", (4, 700), 3.0, every | {"min_p_first": True}
    every = {"top_k": 90, "top_p": 0.71, "min_p": 0.011, "top_k_first": False}
    yield "every filter, joint", (4, 700), 3.0, every
    yield "every filter, joint, min-p first", (4, 700), 3.0, every | {"min_p_first": True}
    yield "min-p binds behind top-p", (4, 5700), 2.0, {"top_p": 0.97, "min_p": 0.05}
    yield "joint, top_k binds", (3, 700), 1.0, {"top_k": 9, "top_p": 0.71, "top_k_first": False}
    yield "large top_k", (3, 3000), 3.0, {"top_k": 1700}
    yield "large top_k and top_p", (3, 5000), 1.0, {"top_k": 2700, "top_p": 0.97}
    yield "large, hot", (3, 3000), 3.0, {"top_k": 1700, "top_p": 0.97, "temperature": 3.0}
    yield "hot, no filter", (2, 5000), 3.0, {"temperature": 50.0}
    yield "cold", (3, 5000), 3.0, {"temperature": 0.05, "top_p": 0.95}
    yield "temperature 0", (3, 200), 3.0, {"temperature": 0.0}
    yield "top_p 0", (2, 200), 3.0, {"top_p_arr": _floats(0.0, 1.0)}
    yield "top_k 1", (2, 200), 3.0, {"top_k_arr": _ints(1, 0)}
    yield "keep all by large parameters", (2, 64), 3.0, {"top_k": 64, "top_p": 1.5}
    arrays = {"top_k_arr": torch.tensor([-1, 20, 2000, 300]), "top_p_arr": _floats(0.8, 1.0, 0.95, 0.6)}
    yield "per-row top_k, top_p", (4, 900), 3.0, arrays
    yield "per-row top_k", (4, 900), 3.0, {"top_k_arr": arrays["top_k_arr"]}
    yield "per-row top_p", (4, 900), 3.0, {"top_p_arr": arrays["top_p_arr"]}
    arrays |= {"min_p_arr": _floats(0.0, 0.01, 0.0, 0.02)}
    yield "per-row arrays", (4, 900), 3.0, arrays
    temperatures = _floats(1.0, 0.5, 2.0, 0.0)
    yield "per-row temperature", (4, 900), 3.0, {"temperature_arr": temperatures}
    yield "all per-row arrays", (4, 900), 3.0, arrays | {"temperature_arr": temperatures}
    yield "indices", (3, 400), 3.0, {"indices": torch.tensor([2, 0, 0, 1, 2])}
    yield "indices, filters", (3, 400), 3.0, {"indices": torch.tensor([2, 0, 0, 1, 2]), "top_k": 20, "top_p": 0.9}
    yield "int32 indices, arrays", (2, 130), 3.0, {"indices": _ints(1, 1, 0), "top_k_arr": _ints(3, 9, 0)}
    yield "one token", (2, 1), 3.0, {"top_k": 5}
    yield "one token, no filter", (2, 1), 3.0, {}
    yield "no rows", (0, 10), 3.0, {}


def _hostile(rand, generator, dtype) -> Iterator[tuple[str, torch.Tensor, dict]]:
    """(name, logits, options) of rows with ties and special values."""
    ties = torch.randint(0, 4, (4, 300), generator=generator).to(dtype)
    yield "ties, exact", ties, {"top_k": 20}
    yield "ties, threshold", ties, {"top_k": 20, "top_k_ties": "threshold"}
    yield "ties, top-k and top-p", ties * 2, {"top_k": 150, "top_p": 0.77}
    yield "ties, top-p", ties * 2, {"top_p": 0.77}
    equal = torch.full((3, 4099), 1.5).to(dtype)
    yield "all equal", equal, {"top_k": 1000, "top_p": 0.5}
    yield "all equal, top-p", equal, {"top_p": 0.3}
    yield "all equal, top-k", equal, {"top_k": 1234}
    yield "ties of the maximum, top_k 1 threshold", ties, {"top_k": 1, "top_k_ties": "threshold"}
    masked = rand(4, 600)
    masked[:, ::3] = -torch.inf
    masked[1, 5:] = -torch.inf
    for options in ({"top_k": 450}, {"top_p": 0.9}, {"min_p": 0.01}, {}):
        yield "-inf logits", masked, options
    lowest = masked.clone()
    lowest[:, 1::3] = torch.finfo(dtype).min
    yield "lowest finite logits", lowest, {"top_p": 0.9}
    yield "lowest finite logits, top-k", lowest, {"top_k": 250}
    special = rand(6, 150)
    special[0, 17] = torch.nan
    special[1] = -torch.inf
    special[2] = torch.nan
    special[3, [5, 70, 71]] = torch.inf
    special[4, 1:] = -torch.inf
    special[5, 9] = -torch.nan
    for options in ({"top_p": 0.9}, {"top_k": 2}, {"top_k": 7}, {"min_p": 0.1}, {}, {"temperature": 0.0}):
        yield "degenerate rows", special, options
    yield "denormal logits", torch.arange(64).float()[None].mul(1e-41).to(dtype), {"top_k": 11, "top_p": 0.78}


def _hostile_probs(generator) -> Iterator[tuple[str, torch.Tensor, dict]]:
    rows = torch.rand(8, 150, generator=generator)
    rows[0, 3], rows[1, 9], rows[2] = -1e-30, torch.nan, 0.0
    rows[3] *= torch.linspace(1e-40, 3e-39, 150)
    rows[4, :] = 0
    rows[4, 77] = 1.0
    rows[5, [5, 70, 71]] = torch.inf
    rows[6] = 1e38 * rows[6]
    rows[7, 1::2] = -0.0
    for options in ({}, {"top_p": 0.83}, {"top_k": 20}, {"min_p": 0.31}, {"top_k": 20, "top_p": 0.71}):
        yield "degenerate probs", rows, options
    flat = torch.rand(2, 9001, generator=generator) + 0.5
    for options in ({}, {"top_p": 0.7}, {"top_k": 5000}, {"top_k": 5000, "top_p": 0.7}):
        yield "unnormalised, nearly flat", flat, options
    wide = torch.exp2(torch.rand(2, 3000, generator=generator) * 240 - 140)
    for options in ({}, {"top_p": 0.9}, {"top_k": 100}, {"top_k": 1100}, {"min_p": 1e-4}):
        yield "over the whole range of floats", wide, options


def row_samples(row_op: RowOp):
    """The `samples` of an op's spec."""

    def samples(device, dtype):
        generator = torch.Generator().manual_seed(20)

        def rand(*shape, spread=3.0):
            return (torch.randn(*shape, generator=generator) * spread).to(dtype)

        def rows(logits):
            return logits if row_op.source == "logits" else logits.float().softmax(-1)

        def sample(name, x, options):
            if not set(options) <= set(row_op.options):
                return
            args: tuple = (x,)
            if row_op.draws:
                a = row_op.bind(args, options)
                of_draw = x if a["indices"] is None else x[a["indices"].long()]
                probs = kept_probs(of_draw, **filters_of(a))
                wanted = torch.rand(of_draw.shape[0], generator=generator, dtype=torch.float64) * 0.98 + 0.01
                args = (x, middle_uniform(probs, wanted))
            yield Sample(args, options, name).map_tensors(lambda t: t.to(device))

        for name, shape, spread, options in _options():
            yield from sample(name, rows(rand(*shape, spread=spread)), options)
        for f in ({}, {"top_k": 40}, {"top_p": 0.9}):
            yield from sample("strided rows", rows(rand(6, 512))[::2, :300], f)
        for name, x, options in _hostile(rand, generator, dtype):
            yield from sample(name, rows(x), options)
        if row_op.source == "probs":
            for name, x, options in _hostile_probs(generator):
                yield from sample(name, x, options)
        if row_op.draws:
            zeros = torch.zeros(1, 3)
            yield Sample((rows(rand(3, 50)), zeros), {}, "uniform [1, batch], zeros").map_tensors(
                lambda t: t.to(device)
            )

    return samples


def _row_errors(source: str, device) -> Iterator[ErrorSample]:
    """Of all such ops; the arguments behind the row by name."""
    x, u = torch.rand(2, 8, device=device), torch.rand(2, device=device)
    types = "float32, bfloat16 or float16" if source == "logits" else "float32"
    yield ErrorSample((x.double(),), rf"{source} must be {types}, got float64; convert")
    yield ErrorSample((x[0],), rf"{source} must be \[rows, vocab_size\], got \[8\]; reshape it to 2 dimensions")
    yield ErrorSample((x.t(),), rf"{source} must have a contiguous last dimension, got strides \[1, 8\]; call")
    yield ErrorSample((x[:, :0],), rf"{source} must have at least one column, got vocab_size 0; pass")
    yield ErrorSample((x,), r"uniform must be \[batch\] or \[1, batch\] = \[2\], got \[1\]", {"uniform": u[:1]})
    text = r"uniform must be \[batch\] or \[1, batch\] = \[1, 2\], got \[2, 1\]; check"
    yield ErrorSample((x,), text, {"uniform": u[:, None]})
    yield ErrorSample((x,), r"uniform must be float32, got float64; convert", {"uniform": u.double()})
    yield ErrorSample((x,), r"indices must be int32 or int64, got float32", {"indices": u})
    yield ErrorSample((x,), r"top_k_arr must be int32 or int64, got float32", {"top_k_arr": u})
    yield ErrorSample((x,), r"top_p_arr must be \[batch\] = \[2\], got \[1\]; check", {"top_p_arr": u[:1]})
    yield ErrorSample((x,), r"min_p_arr must be float32, got float64; convert", {"min_p_arr": u.double()})
    yield ErrorSample((x,), r"temperature_arr must be \[batch\] = \[2\], got \[1, 2\]", {"temperature_arr": u[None]})
    yield ErrorSample((x,), r"top_p must be a number >= 0, got nan; pass 1", {"top_p": math.nan})
    yield ErrorSample((x,), r"top_p must be a number >= 0, got -0.5; pass 1", {"top_p": -0.5})
    yield ErrorSample((x,), r"min_p must be in \[0, 1\], got 1.5; pass 0", {"min_p": 1.5})
    yield ErrorSample((x,), r"min_p must be in \[0, 1\], got nan; pass 0", {"min_p": math.nan})
    yield ErrorSample((x,), r"temperature must be a number >= 0, got -1; pass 0", {"temperature": -1.0})
    yield ErrorSample((x,), r"top_k_ties must be 'exact' or 'threshold', got 'any'; pass", {"top_k_ties": "any"})
    if torch.device(device).type != "meta":
        other = {"uniform": torch.empty(2, device="meta")}
        yield ErrorSample((x,), rf"uniform must be on {source}'s device .*, got .*; move", other)

    def values(match, **options):
        return ErrorSample((x,), match, options, needs_values=True)

    def floats(*numbers):
        return torch.tensor(numbers, device=device)

    yield values(r"uniform must be in \[0, 1\), got 1 at 1; draw", uniform=floats(0.5, 1.0))
    yield values(r"uniform must be in \[0, 1\), got nan at 0; draw", uniform=floats(math.nan, 0.0))
    yield values(r"top_p_arr must be numbers >= 0, got nan at 1; pass 1", top_p_arr=floats(0.5, math.nan))
    yield values(r"min_p_arr must be in \[0, 1\], got -0.25 at 0; pass 0", min_p_arr=floats(-0.25, 0.5))
    yield values(r"temperature_arr must be numbers >= 0, got -1 at 1; pass 0", temperature_arr=floats(1.0, -1.0))
    rows = torch.tensor([0, 2], device=device)
    yield values(r"indices must be in \[0, 2\), got 2 at 1; pass", indices=rows)
    yield values(r"indices must be in \[0, 2\), got -1 at 0; pass", indices=rows.int() - 1)


def row_errors(row_op: RowOp):
    """The `errors` of an op's spec."""

    def errors(device):
        names = {*row_op.options, *(("uniform",) if row_op.draws else ())}
        for e in _row_errors(row_op.source, device):
            if not set(e.kwargs) <= names:
                continue
            options = dict(e.kwargs)
            args = e.args
            if row_op.draws:
                args = (*args, options.pop("uniform", torch.rand(2, device=device)))
            yield ErrorSample(args, e.match, options, e.needs_values)
        x = torch.rand(2, 8, device=device).requires_grad_()
        args = (x, torch.rand(2, device=device)) if row_op.draws else (x,)
        yield ErrorSample(args, r"has no backward, got an input that requires grad; call it under")

    return errors
