"""No copy of a cache in the generated code: it is written to in place, or the write is left to stock's own code.

Measured by the buffers as large as a cache (or larger) that the generated code allocates: those that are not there with
stock torch must not be there with the rewrites.
"""

from __future__ import annotations

import ast
import copy
import math
import re

import pytest
import torch
from snippets.cache import HKV, LMAX, B, D, attend, by_length, step
from torch._inductor.utils import fresh_cache, run_and_get_code

import fi_ops
from fi_ops.inductor.sites import recording
from fi_ops.testing import assert_within_budget

CACHE = (B, HKV, LMAX, D)
APPEND, PLAIN = "append + attention", "attention"
IN_A_VIEW = APPEND if torch.__version__ >= "2.13" else PLAIN
"""Before, torch addresses a view of an input that begins inside its storage wrongly."""


@pytest.fixture(autouse=True)
def _clean():
    torch._dynamo.reset()
    with fresh_cache():
        yield
    torch._dynamo.reset()


def write(kc, vc, positions, k, v, how):
    if how == "index_copy":
        kc.index_copy_(2, positions, k)
        vc.index_copy_(2, positions, v)
    elif how == "index_put":
        kc[:, :, positions] = k
        vc[:, :, positions] = v
    else:
        kc[:, :, 4 : 4 + k.shape[2]] = k
        vc[:, :, 4 : 4 + v.shape[2]].copy_(v)


def two_caches(q, k, v, kc, vc, positions, mask, how):
    write(kc, vc, positions, k, v, how)
    return attend(q, kc, vc, mask)


def read_after(q, k, v, kc, vc, positions, mask, how):
    write(kc, vc, positions, k, v, how)
    return attend(q, kc, vc, mask), kc.sum(), vc.mean(2)


def returned(q, k, v, kc, vc, positions, mask, how):
    write(kc, vc, positions, k, v, how)
    return attend(q, kc, vc, mask), kc, vc


def laid_out_by_length(q, k, v, kc, vc, positions, mask, how):
    q, k, v, kc, vc = (t.transpose(1, 2) for t in (q, k, v, kc, vc))
    write(kc, vc, positions, k, v, how)
    return attend(q, kc, vc, mask)


def indexed_by_length(q, k, v, kc, vc, positions, mask, how):
    kc[:, positions], vc[:, positions] = k, v
    return attend(*(t.transpose(1, 2) for t in (q, kc, vc)), mask)


def stacked(q, k, v, both, positions, mask, how):
    """[2, B, H, L, D]"""
    write(both[0], both[1], positions, k, v, how)
    return attend(q, both[0], both[1], mask)


def unbound(q, k, v, both, positions, mask, how):
    kc, vc = both.unbind(0)
    write(kc, vc, positions, k, v, how)
    return attend(q, kc, vc, mask)


def stacked_in_batches(q, k, v, both, positions, mask, how):
    """[B, 2, H, L, D]"""
    kc, vc = both[:, 0], both[:, 1]
    write(kc, vc, positions, k, v, how)
    return attend(q, kc, vc, mask)


def stacked_by_length(q, k, v, both, positions, mask, how):
    """[2, B, L, H, D]"""
    kc, vc = (cache.transpose(1, 2) for cache in both)
    write(kc, vc, positions, k, v, how)
    return attend(q, kc, vc, mask)


def stacked_layers(q, k, v, caches, positions, mask, how):
    """[layers, 2, B, H, L, D]"""
    for kc, vc in caches:
        write(kc, vc, positions, k, v, how)
        q = attend(q, kc, vc, mask)
    return q


def stacked_and_read(q, k, v, both, positions, mask, how):
    return stacked(q, k, v, both, positions, mask, how), both.sum(), both[1].mean(2)


def stacked_and_returned(q, k, v, both, positions, mask, how):
    return stacked(q, k, v, both, positions, mask, how), both, both[0]


def read_between_the_writes(q, k, v, both, positions, mask, how):
    both[0][:, :, positions] = k
    before = both[1].mean()
    both[1][:, :, positions] = v
    return attend(q, both[0], both[1], mask) + before


def two_layers(q, k, v, kc, vc, kc2, vc2, positions, mask, how):
    q = two_caches(q, k, v, kc, vc, positions, mask, how)
    return two_caches(q, v, k, kc2, vc2, positions, mask, how)


def one_storage():
    """Keys and values as two arguments cut out of one tensor."""
    q, k, v, *_, positions, mask = step()
    return q, k, v, *torch.randn(2, *CACHE).unbind(0), positions, mask


def one_storage_in_batches():
    q, k, v, *_, positions, mask = step()
    return q, k, v, *torch.randn(B, 2, *CACHE[1:]).unbind(1), positions, mask


def one_storage_for_all_layers():
    """Keys of all layers in one tensor, values in another."""
    q, k, v, *_, positions, mask = step()
    keys, values = torch.randn(2, *CACHE), torch.randn(2, *CACHE)
    return q, k, v, keys[0], values[0], keys[1], values[1], positions, mask


def one_part_of_a_storage():
    """Caches that begin inside their storages, which no other argument shares."""
    q, k, v, *_, positions, mask = step()
    return q, k, v, torch.randn(3, *CACHE)[1], torch.randn(3, *CACHE)[2], positions, mask


def one_part_of_a_storage_by_length():
    q, k, v, kc, vc, positions, mask = by_length()
    return q, k, v, torch.randn(3, *kc.shape)[1], torch.randn(3, *vc.shape)[2], positions, mask


def one_part_of_a_stack():
    q, k, v, *_, positions, mask = step()
    return q, k, v, torch.randn(2, 2, *CACHE)[1], positions, mask


def in_one_tensor(*leading):
    q, k, v, *_, positions, mask = step()
    return q, k, v, torch.randn(*leading), positions, mask


ALL = ("index_copy", "index_put", "slice")
CASES = [
    # (function, inputs, ways to write, grade, allocates no buffer of a cache's size)
    (two_caches, step, ALL, APPEND, True),
    (two_caches, one_part_of_a_storage, ("index_put",), APPEND, True),
    (read_after, step, ("index_copy", "slice"), APPEND, True),
    (returned, step, ("index_copy", "slice"), APPEND, True),
    (laid_out_by_length, by_length, ("index_copy",), APPEND, True),
    (indexed_by_length, by_length, ("index_put",), APPEND, True),
    (indexed_by_length, one_part_of_a_storage_by_length, ("index_put",), IN_A_VIEW, True),
    (two_caches, one_storage, ALL, PLAIN, True),
    (two_layers, one_storage_for_all_layers, ("index_put",), PLAIN, True),
    (two_caches, one_storage_in_batches, ("index_put", "slice"), PLAIN, False),
    (stacked, lambda: in_one_tensor(2, *CACHE), ALL, APPEND, True),
    (unbound, lambda: in_one_tensor(2, *CACHE), ("index_put",), APPEND, True),
    (stacked_in_batches, lambda: in_one_tensor(B, 2, *CACHE[1:]), ("index_put",), APPEND, True),
    (stacked_by_length, lambda: in_one_tensor(2, B, LMAX, HKV, D), ("index_copy", "index_put"), APPEND, True),
    (stacked_layers, lambda: in_one_tensor(3, 2, *CACHE), ALL, APPEND, True),
    (stacked_and_read, lambda: in_one_tensor(2, *CACHE), ("index_copy", "slice"), APPEND, True),
    (stacked_and_returned, lambda: in_one_tensor(2, *CACHE), ("index_copy",), APPEND, True),
    (stacked, one_part_of_a_stack, ("index_put",), IN_A_VIEW, torch.__version__ >= "2.13"),
    (read_between_the_writes, lambda: in_one_tensor(2, *CACHE), ("index_put",), PLAIN, False),
]
PARAMETERS = [
    pytest.param(
        fn, inputs, how, grade, none, id=f"{fn.__name__}-{inputs.__name__}-{how}".replace("<lambda>", "tensor")
    )
    for fn, inputs, hows, grade, none in CASES
    for how in hows
]


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []


def compile_and_run(fn, inputs, how, rewritten):
    """(outputs and inputs afterwards, grades, numbers of elements of the buffers that are as large as a cache)"""
    torch._dynamo.reset()
    with torch.no_grad(), fi_ops.enabled(rewritten), recording() as reports:
        output, codes = run_and_get_code(torch.compile(fn, fullgraph=True), *inputs, how)
    grades = [site.grade for report in reports for site in report.sites if site.kind == "attention"]
    return tensors((output, inputs)), grades, large_buffers(codes, math.prod(CACHE))


def large_buffers(codes: list[str], least: int) -> list[int]:
    sizes = [
        math.prod(int(d) for d in re.findall(r"\d+", shape))
        for code in codes
        for shape in re.findall(r"= empty_strided_cpu\(\(([^)]*)\)", code)
    ]
    return [size for size in sizes if size >= least]


def eager(fn, inputs, how, dtype):
    inputs = copied(inputs, dtype)
    with torch.no_grad():
        return tensors((fn(*inputs, how), inputs))


def copied(inputs, dtype=torch.float32):
    """A copy in which tensors share storages as they do in the original."""
    storages: dict[int, torch.Tensor] = {}

    def copy_of(tensor):
        if not tensor.is_floating_point():
            return tensor.clone()
        flat = torch.empty(0).set_(tensor.untyped_storage())
        flat = storages.setdefault(tensor.untyped_storage()._cdata, flat.to(dtype, copy=True))
        return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return tuple(map(copy_of, inputs))


@pytest.mark.parametrize(("fn", "inputs", "how", "grade", "none"), PARAMETERS)
def test_no_copy_of_a_cache(fn, inputs, how, grade, none):
    torch.manual_seed(0)
    inputs = inputs()
    got, grades, ours = compile_and_run(fn, copied(inputs), how, rewritten=True)
    assert set(grades) == {grade}, grades
    for mine, exact, plain in zip(
        got, eager(fn, inputs, how, torch.float64), eager(fn, inputs, how, torch.float32), strict=True
    ):
        if mine.is_floating_point():
            assert_within_budget(mine, exact, plain)
        else:
            assert torch.equal(mine, plain)
    if none:
        assert not ours
    if ours:
        _, _, stock = compile_and_run(fn, copied(inputs), how, rewritten=False)
        assert sum(ours) <= sum(stock), (ours, stock)


def test_no_copy_of_a_cache_in_a_model():
    """Hugging Face's decode step, with everything around the attention."""
    transformers = pytest.importorskip("transformers")
    from test_inductor_models import FULL, LAYERS, build, new_cache

    model = build("Llama")
    cache = new_cache(model, "static")
    ids = torch.randint(1, 64, (2, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), fi_ops.enabled(), recording() as reports:
        model(ids, past_key_values=cache)
        reference = model(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
        step = torch.compile(model.forward)
        output, codes = run_and_get_code(step, ids[:, :1], past_key_values=cache)
    assert [s.grade for r in reports for s in r.sites if s.kind == "attention"] == [FULL] * LAYERS
    torch.testing.assert_close(output.logits, reference, rtol=1e-4, atol=1e-5)
    assert isinstance(cache, transformers.StaticCache)
    assert not large_buffers(codes, cache.layers[0].keys.numel())


def test_layers_share_masks_and_tables():
    """Mask, cos and sin are computed once; Inductor by itself would do so for every op that reads them."""
    pytest.importorskip("transformers")
    from test_inductor_models import LAYERS, build, new_cache

    model = build("Llama")
    cache = new_cache(model, "static")
    ids = torch.randint(1, 64, (2, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), fi_ops.enabled():
        model(ids, past_key_values=cache)
        _, (code, *_) = run_and_get_code(torch.compile(model.forward), ids[:, :1], past_key_values=cache)
    calls = [
        line.split("=", 1)[1].strip() for line in code.splitlines() if "= torch.ops.fi.rope_append_attention" in line
    ]
    schema = [argument.name for argument in torch.ops.fi.rope_append_attention.default._schema.arguments]
    shared = [schema.index(name) for name in ("cos", "sin", "mask")]
    arguments = [ast.parse(call, mode="eval").body.args for call in calls]
    read = [
        [ast.unparse(args[i]) for i in shared if i < len(args)] for args in arguments
    ]  # a proven mask is no argument
    assert len(calls) == LAYERS and all(names == read[0] for names in read), read


def test_explain_says_why_a_quantised_cache_is_not_appended_to(capsys):
    from snippets.unusual_caches import int8_with_scales, quantised

    with torch.no_grad():
        fi_ops.explain(int8_with_scales, *quantised())
    printed = capsys.readouterr().out
    assert "attention: 1 of 1 rewritten" in printed and "is not a write to a static cache" in printed
