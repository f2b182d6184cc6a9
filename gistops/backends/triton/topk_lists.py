"""The lists of top-k: the k best candidates of each row, as keys.

A key is one int64: the bits of the score in the order of numbers, the inverted class (24 bits), the slot (8 bits). Keys
are unique, so the result does not depend on the order in which they are compared.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def candidate_keys(z, classes, slot):
    """Return the keys of scores, float32. NaN is the largest score, -0 equals 0, and the lower class wins a tie."""
    z = tl.where(z != z, tl.full(z.shape, float("nan"), tl.float32), z + 0.0)
    bits = z.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    tag = ((16777215 - classes).to(tl.int64) << 8) | slot.to(tl.int64)
    return (ordered.to(tl.int64) << 32) | tag


@triton.jit
def key_parts(key):
    """Return the scores, classes and slots of keys."""
    ordered = (key >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    tag = key & 0xFFFFFFFF
    return bits.to(tl.float32, bitcast=True), 16777215 - (tag >> 8), (tag & 255).to(tl.uint8)


@triton.jit
def no_key(shape: tl.constexpr):
    """Return keys that are less than every candidate's."""
    return tl.full(shape, -9223372036854775808, tl.int64)


@triton.jit
def empty_lists(k, KEEP: tl.constexpr, BLOCK_B: tl.constexpr):
    """Return lists [KEEP, rows] without candidates.

    In the first k places the keys are different, and less than every candidate's. In the others they are larger than
    every candidate's, so that no candidate replaces them.
    """
    places = tl.arange(0, KEEP).to(tl.int64)
    free = tl.where(places < k, places - 9223372036854775807, tl.full((KEEP,), 9223372036854775807, tl.int64))
    return free[:, None] + tl.zeros((KEEP, BLOCK_B), tl.int64)


@triton.jit
def keep_best(best, keys):
    """Return lists [KEEP, rows] with the largest keys of the lists and of a tile [classes, rows], in no order.

    An iteration moves one key per row. Once the lists are good, most tiles take none or few.
    """
    largest = tl.max(keys, 0)
    least = tl.min(best, 0)
    while tl.max((largest > least).to(tl.int32), 0) > 0:
        replaced = (best == least[None, :]) & (largest > least)[None, :]
        best = tl.where(replaced, largest[None, :], best)
        keys = tl.where(keys == largest[None, :], no_key(keys.shape), keys)
        largest = tl.max(keys, 0)
        least = tl.min(best, 0)
    return best


@triton.jit
def shift_of(largest):
    """Return the maximum, or 0 in place of an infinity: the shift of exponentials, since inf - inf would be NaN."""
    return tl.where(tl.abs(largest) == float("inf"), tl.zeros_like(largest), largest)


@triton.jit
def tile_sums(z, valid):
    """Return the maximum of each row of a tile [classes, rows] and the sum of exponentials of z - maximum."""
    counted = tl.where(valid, z, tl.full(z.shape, float("-inf"), z.dtype))
    largest = tl.max(counted, 0)
    return largest, tl.sum(tl.exp(counted - shift_of(largest)[None, :]), 0)


@triton.jit
def merge_sums(largest, total, more_largest, more_total):
    """Return the maximum and the sum of exponentials of two parts together."""
    joint = tl.maximum(largest, more_largest)
    shift = shift_of(joint)
    # exp(inf - 0) of a part without an infinity of its own would be inf as well, which is the sum.
    return joint, total * tl.exp(largest - shift) + more_total * tl.exp(more_largest - shift)
