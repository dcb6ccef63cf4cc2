"""The Python side of the sampling family: FlashInfer's signatures, random numbers, refusals; pipelines."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch

import fi_ops
from fi_ops.logits_processor import LogitsPipe, MinP, Sample, Softmax, Temperature, TensorType, TopK, TopP

LOGITS = torch.randn(5, 400, generator=torch.Generator().manual_seed(1)) * 3
PROBS = LOGITS.softmax(-1)
DRAFT = (PROBS[:, None].expand(-1, 2, -1), LOGITS.topk(2).indices, PROBS[:, None].expand(-1, 3, -1))
SAMPLERS = {
    "sampling_from_probs": (PROBS,),
    "sampling_from_logits": (LOGITS,),
    "top_p_sampling_from_probs": (PROBS, 0.9),
    "top_k_sampling_from_probs": (PROBS, 20),
    "min_p_sampling_from_probs": (PROBS, 0.05),
    "top_k_top_p_sampling_from_probs": (PROBS, 20, 0.9),
    "top_k_top_p_sampling_from_logits": (LOGITS, 20, 0.9),
}
EACH = pytest.mark.parametrize("name", SAMPLERS)


@EACH
def test_sampler(name):
    """Its op, whose random numbers come from where the arguments say."""
    function, args = getattr(fi_ops, name), SAMPLERS[name]
    uniform = torch.rand(5, generator=torch.Generator().manual_seed(2))
    keys = [k for k in inspect.signature(function).parameters if k in ("top_p", "top_k", "min_p")]
    filters = dict(zip(keys, args[1:], strict=False))
    expected, valid = getattr(torch.ops.fi, name)(args[0], uniform, **filters)
    got = function(*args, uniform=uniform, return_valid=True)
    assert torch.equal(got[0], expected) and torch.equal(got[1], valid)
    per_row = [torch.full((5,), a) if isinstance(a, float) else torch.full((5,), int(a)) for a in args[1:]]
    assert torch.equal(function(args[0], *per_row, uniform=uniform), expected)

    generator = torch.Generator().manual_seed(3)
    first = function(*args, generator=generator)
    assert torch.equal(first, function(*args, generator=generator.manual_seed(3)))
    torch.manual_seed(4)
    first = function(*args)
    torch.manual_seed(4)
    assert torch.equal(first, function(*args))
    seeds, rows = torch.tensor([5, 6, 7]), torch.tensor([4, 0, 4])
    shared = function(*args, indices=rows, seed=seeds, offset=torch.tensor([9]))
    assert shared.dtype == torch.int64
    alone = [
        function(*args, indices=rows[i : i + 1], seed=seeds[i : i + 1], offset=torch.tensor([9])) for i in range(3)
    ]
    assert torch.equal(shared, torch.cat(alone))

    with_nan = args[0].clone()
    with_nan[2, 3] = torch.nan
    tokens, valid = function(with_nan, *args[1:], return_valid=True)
    assert valid.tolist() == [True, True, False, True, True] and tokens[2] == 0
    with pytest.raises(ValueError, match=f"fi_ops.{name}: the input has NaN"):
        function(with_nan, *args[1:], check_nan=True)
    with pytest.raises(RuntimeError, match="seed and generator must not both be given"):
        function(*args, seed=1, generator=generator)
    with pytest.raises(RuntimeError, match="uniform must come alone"):
        function(*args, seed=1, uniform=uniform)


@EACH
def test_older_convention_is_refused(name):
    """uniform_samples in the second place, or by name, is told what to write instead."""
    function, args = getattr(fi_ops, name), SAMPLERS[name]
    for uniform in (torch.rand(5), torch.rand(32, 5)):
        with pytest.raises(TypeError, match=f"fi_ops.{name}: uniform_samples is .* pass your numbers as uniform="):
            function(args[0], uniform, *args[1:])
        with pytest.raises(TypeError, match="uniform_samples is"):
            function(*args, uniform_samples=uniform)


def test_speculative():
    uniform = torch.rand(5, 3, generator=torch.Generator().manual_seed(2))
    draft, ids, target = DRAFT
    function, op = fi_ops.chain_speculative_sampling, torch.ops.fi.chain_speculative_sampling
    for got, expected in zip(function(*DRAFT, uniform=uniform), op(draft, ids, uniform, target), strict=True):
        assert torch.equal(got, expected)
    accepted, emitted = torch.full((5,), 10, dtype=torch.int32), torch.full((5,), 20, dtype=torch.int32)
    _, got_accepted, got_emitted = function(*DRAFT, accepted, emitted, uniform=uniform)
    assert got_accepted is accepted and got_emitted is emitted
    counts = op(draft, ids, uniform, target)
    assert torch.equal(accepted, counts[1] + 10) and torch.equal(emitted, counts[2] + 20)
    seeds = torch.arange(5)
    whole = function(*DRAFT, seed=seeds)[0]
    alone = [function(*(t[i : i + 1] for t in DRAFT), seed=seeds[i : i + 1])[0] for i in range(5)]
    assert torch.equal(whole, torch.cat(alone))
    with pytest.raises(TypeError, match=r"chain_speculative_sampling: uniform_samples is .* uniform="):
        function(draft, ids, uniform, target)


def test_numbers_of_a_seed():
    """A row with a seed of its own has the same numbers alone; without, all numbers of a batch differ."""
    from fi_ops._uniform import _philox_numbers

    seeds = torch.tensor([3, 9])
    both = _philox_numbers(seeds, 1, 2, 4, "cpu")
    assert torch.equal(both[1:], _philox_numbers(seeds[1:].repeat(2), 1, 2, 4, "cpu")[:1])
    assert _philox_numbers(3, 1, 50, 4, "cpu").unique().numel() > 195
    assert torch.equal(both[:, 0], fi_ops.philox_uniform(seeds, 1, 2))


@pytest.mark.parametrize("name", ["top_p_sampling_from_probs", "top_k_top_p_sampling_from_logits"])
def test_compiles_fullgraph(name):
    function, args = getattr(fi_ops, name), SAMPLERS[name]
    compiled = torch.compile(lambda x, seed: function(x, *args[1:], seed=seed), fullgraph=True, backend="aot_eager")
    seeds = torch.arange(5)
    assert torch.equal(compiled(args[0], seeds), function(*args, seed=seeds))


def test_renorm_functions():
    probs, rows = PROBS, torch.full((5,), 20)
    assert torch.equal(fi_ops.top_k_renorm_probs(probs, rows), fi_ops.top_k_renorm_probs(probs, 20))
    assert torch.equal(fi_ops.top_p_renorm_probs(probs, torch.full((5,), 0.9)), fi_ops.top_p_renorm_probs(probs, 0.9))
    assert torch.equal(fi_ops.top_k_mask_logits(LOGITS, rows), fi_ops.top_k_mask_logits(LOGITS, 20))
    assert torch.equal(fi_ops.softmax(LOGITS, torch.full((5,), 0.5)), fi_ops.softmax(LOGITS, 0.5))
    assert (fi_ops.softmax(LOGITS) - LOGITS.softmax(-1)).abs().max() < 1e-6
    with pytest.raises(RuntimeError, match="enable_pdl must be None or False"):
        fi_ops.softmax(LOGITS, enable_pdl=True)


def test_apply_penalties_is_vllms():
    counts = torch.randint(-3, 3, (5, 400), generator=torch.Generator().manual_seed(3)).clamp_min(0).int()
    prompt = torch.rand(5, 400, generator=torch.Generator().manual_seed(4)) < 0.1
    presence, frequency, repetition = torch.rand(5), torch.rand(5), torch.rand(5) + 0.5
    seen = prompt | (counts > 0)
    scale = torch.where(seen, repetition[:, None], 1.0)
    expected = torch.where(LOGITS > 0, LOGITS / scale, LOGITS * scale)
    expected = expected - frequency[:, None] * counts - presence[:, None] * (counts > 0)
    got = fi_ops.apply_penalties(LOGITS, prompt, counts, presence, frequency, repetition)
    assert (got - expected).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------ pipelines

VALUES = {"temperature": 0.8, "top_k": 40, "top_p": 0.85, "min_p": 0.03}
FILTERS = [list(order) for n in range(4) for order in itertools.permutations((TopK, TopP, MinP), n)]


def needed(processors) -> dict:
    return {p.parameter: VALUES[p.parameter] for p in processors if p.parameter}


@pytest.mark.parametrize("order", FILTERS, ids=lambda order: "-".join(p.__name__ for p in order) or "none")
@pytest.mark.parametrize("source", ["logits", "probs"])
def test_a_pipe_is_what_its_steps_are(order, source):
    """One op for all is the same distribution, and so the same draws, as an op for each; with arrays too."""
    front = [Temperature(), Softmax()] if source == "logits" else []
    x = LOGITS if source == "logits" else PROBS
    kind = TensorType(source)
    filters = [p() for p in order]
    values = needed([*front, *filters])
    arrays = {k: torch.full((5,), v) for k, v in values.items()}
    if front or filters:
        whole = LogitsPipe([*front, *filters], input_type=kind)(x, **values)
        steps = LogitsPipe([*front, *filters], compile=False, input_type=kind)(x, **values)
        assert torch.equal(whole > 0, steps > 0) and (whole - steps).abs().max() < 1e-6
        assert torch.equal(LogitsPipe([*front, *filters], input_type=kind)(x, **arrays), whole)
    uniform = torch.rand(5, generator=torch.Generator().manual_seed(5))
    whole = LogitsPipe([*front, *filters, Sample()], input_type=kind)
    steps = LogitsPipe([*front, *filters, Sample()], compile=False, input_type=kind)
    assert torch.equal(whole(x, uniform=uniform, **values), steps(x, uniform=uniform, **values))
    assert torch.equal(whole(x, uniform=uniform, **arrays), whole(x, uniform=uniform, **values))


@pytest.mark.parametrize("compile", [True, False])
def test_pipes_of_logits(compile):
    def pipe(*processors):
        return LogitsPipe(list(processors), compile=compile, input_type=TensorType.LOGITS)

    assert torch.equal(pipe(Temperature())(LOGITS, temperature=2.0), LOGITS / 2)
    masked = fi_ops.top_k_mask_logits(LOGITS, 7)
    assert torch.equal(pipe(TopK())(LOGITS, top_k=7), masked)
    assert torch.equal(pipe(TopK(), Temperature())(LOGITS, top_k=7, temperature=2.0), masked / 2)
    uniform = torch.rand(5)
    expected = fi_ops.sampling_from_logits(masked, uniform=uniform)
    assert torch.equal(pipe(TopK(), Sample())(LOGITS, top_k=7, uniform=uniform), expected)
    probs = pipe(TopK(), Softmax(), TopP())(LOGITS, top_k=7, top_p=0.6)
    assert (probs - fi_ops.top_p_renorm_probs(fi_ops.softmax(masked), 0.6)).abs().max() < 1e-6
    joint = pipe(Softmax(), TopK(joint_topk_topp=True), TopP())(LOGITS, top_k=7, top_p=0.6)
    expected = torch.ops.fi.top_k_top_p_renorm_probs(PROBS, top_k=7, top_p=0.6, top_k_first=False)
    assert torch.equal(joint > 0, expected > 0) and (joint - expected).abs().max() < 1e-6


def test_pipe_arguments():
    pipe = LogitsPipe([Temperature(temperature=0.5), Softmax(), TopK(), Sample()])
    assert (
        pipe.initial_type is TensorType.LOGITS
        and repr(pipe) == "LogitsPipe([Temperature -> Softmax -> TopK -> Sample])"
    )
    first = pipe(LOGITS, top_k=4, seed=1)
    assert torch.equal(first, fi_ops.top_k_top_p_sampling_from_logits(LOGITS, 4, 1.0, temperature=0.5, seed=1))
    assert torch.equal(pipe(LOGITS, top_k=4, temperature=0.5, seed=1), first)
    tokens, valid = pipe(LOGITS, top_k=4, seed=1, indices=torch.tensor([1, 1]), return_valid=True)
    assert tokens.shape == (2,) and valid.all()
    with pytest.raises(TypeError, match="top_k must be given, got none"):
        pipe(LOGITS)
    with pytest.raises(TypeError, match="top_p must have a processor that takes it"):
        pipe(LOGITS, top_k=4, top_p=0.9)
    with pytest.raises(TypeError, match=r"fi_ops.TopK: temperature must be one of its arguments \(top_k\)"):
        TopK(temperature=1.0)


def test_pipes_that_make_no_sense():
    def refused(match, *processors, **options):
        with pytest.raises(ValueError, match=match):
            LogitsPipe(list(processors), **options)

    refused("processors must be one or more, got none")
    refused("input_type must be given where TopK comes first", TopK(), Sample())
    refused("Softmax must come once", Softmax(), Softmax())
    refused("TopP must get probs, got logits", TopP(), Softmax())
    refused("Temperature must get logits, got probs", Softmax(), Temperature())
    refused("TopK must get logits or probs, got indices", Softmax(), Sample(), TopK())
    refused("Softmax must get logits, got probs", Softmax(), input_type=TensorType.PROBS)
    refused("processors must be of this module, got int", 3)
