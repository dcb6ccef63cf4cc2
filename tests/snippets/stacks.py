"""Keys and values, of one layer or of all layers, stacked in one cache."""

import torch

from . import FULL, snippet
from .cache import APPEND, HKV, LMAX, B, attend, slice_step, step
from .rope import D, rotate_half, tables_half

LAYERS = 3


def stack(*leading):
    def inputs():
        q, k, v, *_, positions, mask = step()
        return q, k, v, torch.randn(*leading), positions, mask

    return inputs


pair = stack(2, B, HKV, LMAX, D)
all_layers = stack(LAYERS, 2, B, HKV, LMAX, D)


def write(kc, vc, positions, k, v):
    kc.index_copy_(2, positions, k)
    vc.index_copy_(2, positions, v)


@snippet(pair, grade=APPEND)
def keys_and_values(q, k, v, both, positions, mask):
    write(both[0], both[1], positions, k, v)
    return attend(q, both[0], both[1], mask)


@snippet(pair, grade=APPEND)
def by_unbind(q, k, v, both, positions, mask):
    kc, vc = both.unbind(0)
    kc[:, :, positions], vc[:, :, positions] = k, v
    return attend(q, kc, vc, mask)


# dynamic=True makes a symbol of the number of parts, so that it is not known which the last one is.
@snippet(pair, grade=APPEND, dynamic_grade="attention")
def values_first_and_from_the_end(q, k, v, both, positions, mask):
    both[-1].index_copy_(2, positions, v)
    both[-2].index_copy_(2, positions, k)
    return attend(q, both[0], both[1], mask)


@snippet(stack(B, 2, HKV, LMAX, D), grade=APPEND)
def in_batches(q, k, v, both, positions, mask):
    both[:, 0].index_copy_(2, positions, k)
    both[:, 1].index_copy_(2, positions, v)
    return attend(q, both[:, 0], both[:, 1], mask)


@snippet(stack(B, HKV, 2, LMAX, D), grade=APPEND)
def in_heads(q, k, v, both, positions, mask):
    both[:, :, 0, positions] = k
    both[:, :, 1, positions] = v
    return attend(q, both[:, :, 0], both[:, :, 1], mask)


@snippet(stack(2, B, LMAX, HKV, D), grade=APPEND)
def laid_out_by_length(q, k, v, both, positions, mask):
    both[0][:, positions] = k.transpose(1, 2)
    both[1][:, positions] = v.transpose(1, 2)
    return attend(q, both[0].transpose(1, 2), both[1].transpose(1, 2), mask)


@snippet(stack(2, B, LMAX, HKV, D), grade=APPEND)
def through_a_transpose(q, k, v, both, positions, mask):
    kc, vc = both[0].transpose(1, 2), both[1].transpose(1, 2)
    write(kc, vc, positions, k, v)
    return attend(q, kc, vc, mask)


@snippet(stack(2, LAYERS, B, HKV, LMAX, D), grade=APPEND)
def all_keys_then_all_values(q, k, v, both, positions, mask):
    keys, values = both
    for i in range(LAYERS):
        write(keys[i], values[i], positions, k, v)
        q = attend(q, keys[i], values[i], mask)
    return q


@snippet(all_layers, grade=APPEND)
def every_layer(q, k, v, caches, positions, mask):
    for i in range(LAYERS):
        write(caches[i, 0], caches[i, 1], positions, k, v)
        q = attend(q, caches[i, 0], caches[i, 1], mask)
    return q


@snippet(all_layers, grade=FULL)
def every_layer_with_rope(q, k, v, caches, positions, mask):
    cos, sin = (t.unsqueeze(1) for t in tables_half(positions, q))
    for cache in caches:
        rotated = (x * cos + rotate_half(x) * sin for x in (q, k))
        q, new = rotated
        write(cache[0], cache[1], positions, new, v)
        q = attend(q, cache[0], cache[1], mask)
    return q


def two_stacks():
    q, k, v, *_, positions, mask = step()
    return q, k, v, torch.randn(LAYERS, B, HKV, LMAX, D), torch.randn(LAYERS, B, HKV, LMAX, D), positions, mask


@snippet(two_stacks, grade=APPEND)
def a_stack_of_keys_and_one_of_values(q, k, v, keys, values, positions, mask):
    for i in range(LAYERS):
        write(keys[i], values[i], positions, k, v)
        q = attend(q, keys[i], values[i], mask)
    return q


def stacked_slice_step():
    q, k, v, kc, vc, start, mask = slice_step()
    return q, k, v, torch.stack((kc, vc)), start, mask


@snippet(stacked_slice_step, grade=APPEND)
def slice_copy_then_prefix_read(q, k, v, both, start, mask):
    end = start + k.shape[2]
    both[0][:, :, start:end] = k
    both[1][:, :, start:end] = v
    return attend(q, both[0][:, :, :end], both[1][:, :, :end], mask[..., :end])


def inside_a_larger_one():
    q, k, v, both, positions, mask = pair()
    return q, k, v, torch.cat((both, both))[2:], positions, mask


@snippet(inside_a_larger_one, grade=APPEND if torch.__version__ >= "2.13" else "attention")
def a_stack_that_begins_inside_another(q, k, v, both, positions, mask):
    return keys_and_values(q, k, v, both, positions, mask)


def every_other_element():
    q, k, v, both, positions, mask = pair()
    return q, k, v, torch.cat((both, both), -1)[..., ::2], positions, mask


@snippet(every_other_element, grade="", reason="stride")
def a_stack_with_gaps(q, k, v, both, positions, mask):
    return keys_and_values(q, k, v, both, positions, mask)


def by_length_in_memory():
    q, k, v, both, positions, mask = pair()
    return q, k, v, both.permute(3, 1, 0, 2, 4).contiguous().permute(2, 1, 3, 0, 4), positions, mask


@snippet(by_length_in_memory, grade=APPEND)
def a_stack_in_another_order_in_memory(q, k, v, both, positions, mask):
    return keys_and_values(q, k, v, both, positions, mask)


@snippet(pair, grade=APPEND)
def read_after(q, k, v, both, positions, mask):
    write(both[0], both[1], positions, k, v)
    return attend(q, both[0], both[1], mask), both.sum((0, 3)), both[0].mean(2), both[1].clone()


@snippet(all_layers, grade=APPEND)
def only_one_layer_is_written(q, k, v, caches, positions, mask):
    write(caches[1, 0], caches[1, 1], positions, k, v)
    return attend(q, caches[1, 0], caches[1, 1], mask), caches[0].sum()


@snippet(pair, grade=APPEND)
def out_of_a_cache_made_here(q, k, v, both, positions, mask):
    fresh = torch.zeros(2, B, HKV, LMAX, D, dtype=q.dtype, device=q.device)
    write(fresh[0], fresh[1], positions, k, v)
    return attend(q, fresh[0], fresh[1], mask), fresh


# ---- near misses ----


@snippet(pair, reason="between the writes")
def values_read_before_they_are_written(q, k, v, both, positions, mask):
    both[0].index_copy_(2, positions, k)
    before = both[1].sum()
    both[1].index_copy_(2, positions, v)
    return attend(q, both[0], both[1], mask) + before


@snippet(pair, reason="between the writes")
def keys_read_before_the_values_are_written(q, k, v, both, positions, mask):
    both[0].index_copy_(2, positions, k)
    v = v + both[0].mean()
    both[1].index_copy_(2, positions, v)
    return attend(q, both[0], both[1], mask)


@snippet(pair, reason="before the attention does")
def query_made_from_the_updated_stack(q, k, v, both, positions, mask):
    write(both[0], both[1], positions, k, v)
    return attend(q + both[1].mean(), both[0], both[1], mask)


@snippet(pair, reason="as it was before the write")
def read_before_the_writes(q, k, v, both, positions, mask):
    before = both[1].mean()
    write(both[0], both[1], positions, k, v)
    return attend(q, both[0], both[1], mask) + before


@snippet(all_layers, reason="as it was before the write")
def another_layer_is_read(q, k, v, caches, positions, mask):
    for i in range(2):
        q = q + caches[0, 0].mean() + caches[2, 1].mean()
        write(caches[i, 0], caches[i, 1], positions, k, v)
        q = attend(q, caches[i, 0], caches[i, 1], mask)
    return q


@snippet(pair, reason="is not a write to a static cache")
def both_written_at_once(q, k, v, both, positions, mask):
    both[:, :, :, positions] = torch.stack((k, v))
    return attend(q, both[0], both[1], mask)


@snippet(pair, reason="one cache|as it was")
def keys_are_values(q, k, v, both, positions, mask):
    both[0].index_copy_(2, positions, k)
    return attend(q, both[0], both[0], mask)


@snippet(pair, reason="one cache|as it was|neither|between")
def attended_to_the_wrong_way_round_after_a_second_write(q, k, v, both, positions, mask):
    both[0].index_copy_(2, positions, v)
    write(both[0], both[1], positions, k, v)
    return attend(q, both[0], both[1], mask)


@snippet(pair, reason="not put back")
def stack_updated_out_of_place(q, k, v, both, positions, mask):
    mine = both[0].index_copy(2, positions, k), both[1].index_copy(2, positions, v)
    return attend(q, *mine, mask)


@snippet(pair, reason="as it was before the write|shape of the slots")
def values_written_from_the_other_half(q, k, v, both, positions, mask):
    both[1][:, :, positions] = both[0][:, :, :3]
    both[0].index_copy_(2, positions, k)
    return attend(q, both[0], both[1], mask)


@snippet(all_layers, reason="different positions")
def parts_at_different_positions(q, k, v, caches, positions, mask):
    caches[0, 0].index_copy_(2, positions, k)
    caches[0, 1].index_copy_(2, positions + 1, v)
    return attend(q, caches[0, 0], caches[0, 1], mask)
