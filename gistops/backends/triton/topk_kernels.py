"""The kernels of top-k: the k best of groups of classes, from tiles of the product that no memory holds, and their merge."""

from __future__ import annotations

import triton
import triton.language as tl

from .cancellation import mark_cancelled, recomputed_logits
from .forward import tile_products
from .max_over_slots import max_over_slots
from .numerics import load_tau
from .topk_lists import (
    candidate_keys,
    empty_lists,
    keep_best,
    key_parts,
    merge_sums,
    no_key,
    shift_of,
    tile_sums,
)


@triton.jit
def topk_partials_kernel(
    input,  # [B, d]
    centers,  # [K, d]
    center_rnorms,  # [M, K]
    shifts,  # [M, B]
    input_rnorms,  # [B]
    tau,  # one element
    class_bias,  # [K], or unused
    lists,  # [B, groups, k] keys
    sums,  # [2, B, groups]: maximum and sum of exponentials, with NEED_LSE
    B,
    K,
    d,
    M,
    k,
    group_tiles,  # class tiles per group
    groups,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEEP: tl.constexpr,  # a power of two, at least k
    UNROLLED_SLOTS: tl.constexpr,  # see max_over_slots
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEED_LSE: tl.constexpr,
):
    """Write the lists of a group of classes and BLOCK_B rows, without classes in which a pair cancels.

    Grid: groups x row tiles. Consecutive programs share a group, so that its centers stay in L2.
    """
    row_tiles = tl.cdiv(B, BLOCK_B)
    group = tl.program_id(0) // row_tiles
    rows = tl.program_id(0) % row_tiles * BLOCK_B + tl.arange(0, BLOCK_B)
    row_valid = rows < B
    scale = load_tau(tau, ACC) * tl.load(input_rnorms + rows, mask=row_valid, other=0.0)
    best = empty_lists(k, KEEP, BLOCK_B)
    largest = tl.full((BLOCK_B,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_B,), ACC)
    end = tl.minimum((group + 1) * group_tiles, tl.cdiv(K, BLOCK_C))
    for tile in range(group * group_tiles, end):
        classes = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        class_valid = classes < K
        # Rows come first in the product: a warp then holds all classes of its rows, and a maximum needs no barrier.
        products = tile_products(
            centers, input, rows, row_valid, classes, class_valid, d, BLOCK_B, BLOCK_C, BLOCK_D, ACC, PRECISION, WIDEN
        )  # fmt: skip
        z, slot = max_over_slots(
            tl.trans(products), classes, class_valid, rows, row_valid, center_rnorms, shifts, B, K, M, UNROLLED_SLOTS
        )  # fmt: skip
        z = z * scale[None, :]
        if HAS_BIAS:
            z = z + tl.load(class_bias + classes, mask=class_valid, other=0.0).to(ACC)[:, None]
        marks = mark_cancelled(tl.zeros((BLOCK_C,), tl.int32), center_rnorms, classes, class_valid, K, M)
        valid = (class_valid & (marks == 0))[:, None] & row_valid[None, :]
        if NEED_LSE:
            tile_largest, tile_total = tile_sums(z, valid)
            largest, total = merge_sums(largest, total, tile_largest, tile_total)
        keys = candidate_keys(z, classes[:, None], slot)
        best = keep_best(best, tl.where(valid, keys, no_key(keys.shape)))
    places = tl.arange(0, KEEP)
    firsts = rows.to(tl.int64) * groups + group
    stored = row_valid[None, :] & (places < k)[:, None]
    tl.store(lists + firsts[None, :] * k + places[:, None], best, mask=stored)
    if NEED_LSE:
        tl.store(sums + firsts, largest, mask=row_valid)
        tl.store(sums + tl.cast(B, tl.int64) * groups + firsts, total, mask=row_valid)


@triton.jit
def topk_cancelled_kernel(
    input,  # [B, d]
    centers,  # [K, d]
    displacements,  # [m, d]
    center_rnorms,  # [M, K]
    input_rnorms,  # [B]
    tau,  # one element
    class_bias,  # [K], or unused
    lists,  # [B, groups, k]
    sums,  # [2, B, groups]
    B,
    K,
    d,
    M,
    k,
    group_tiles,  # tiles of BLOCK_C classes per group
    groups,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEEP: tl.constexpr,
    ACC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEED_LSE: tl.constexpr,
):
    """Add the classes of a group in which a pair cancels to the group's lists. Grid: groups."""
    group = tl.program_id(0)
    start = group * group_tiles
    end = tl.minimum(start + group_tiles, tl.cdiv(K, BLOCK_C))
    places = tl.arange(0, KEEP)
    for tile in range(start, end):
        classes = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        class_valid = classes < K
        marks = mark_cancelled(tl.zeros((BLOCK_C,), tl.int32), center_rnorms, classes, class_valid, K, M)
        if tl.max(marks, 0) > 0:
            for first in range(0, B, BLOCK_B):
                rows = first + tl.arange(0, BLOCK_B)
                row_valid = rows < B
                z, slot = recomputed_logits(
                    input, centers, displacements, center_rnorms, input_rnorms, tau, classes, class_valid, rows, row_valid,
                    K, d, M, BLOCK_C, BLOCK_B, BLOCK_D, ACC,
                )  # fmt: skip
                if HAS_BIAS:
                    z = z + tl.load(class_bias + classes, mask=class_valid, other=0.0).to(ACC)[:, None]
                valid = (marks > 0)[:, None] & row_valid[None, :]
                firsts = rows.to(tl.int64) * groups + group
                stored = row_valid[None, :] & (places < k)[:, None]
                list_ptrs = lists + firsts[None, :] * k + places[:, None]
                # Places beyond k hold the largest number, which no candidate replaces.
                best = tl.load(list_ptrs, mask=stored, other=9223372036854775807)
                keys = candidate_keys(z, classes[:, None], slot)
                best = keep_best(best, tl.where(valid, keys, no_key(keys.shape)))
                tl.store(list_ptrs, best, mask=stored)
                if NEED_LSE:
                    total_ptrs = sums + tl.cast(B, tl.int64) * groups + firsts
                    largest = tl.load(sums + firsts, mask=row_valid, other=float("-inf"))
                    total = tl.load(total_ptrs, mask=row_valid, other=0.0)
                    tile_largest, tile_total = tile_sums(z, valid)
                    largest, total = merge_sums(largest, total, tile_largest, tile_total)
                    tl.store(sums + firsts, largest, mask=row_valid)
                    tl.store(total_ptrs, total, mask=row_valid)
                tl.debug_barrier()  # the next tile's threads may read what other threads have stored here


@triton.jit
def topk_merge_kernel(
    lists,  # [B, groups, k]
    sums,  # [2, B, groups]
    values,  # [B, k]
    classes,  # [B, k]
    slots,  # [B, k]
    lse,  # [B], with NEED_LSE
    B,
    groups,
    k,
    BLOCK: tl.constexpr,  # at least groups * k
    BLOCK_G: tl.constexpr,  # at least groups
    NEED_LSE: tl.constexpr,
):
    """Write the k best of all lists of a row in descending order, and merge its sums. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    count = groups * k
    keys = tl.load(lists + row * count + places, mask=places < count, other=-9223372036854775808)
    for place in range(k):
        key = tl.max(keys, 0)
        keys = tl.where(keys == key, no_key((BLOCK,)), keys)
        value, class_index, slot = key_parts(key)
        tl.store(values + row * k + place, value)
        tl.store(classes + row * k + place, class_index)
        tl.store(slots + row * k + place, slot)
    if NEED_LSE:
        group = tl.arange(0, BLOCK_G)
        ptrs = sums + row * groups + group
        largest = tl.load(ptrs, mask=group < groups, other=float("-inf"))
        total = tl.load(ptrs + tl.cast(B, tl.int64) * groups, mask=group < groups, other=0.0)
        shift = shift_of(tl.max(largest, 0))
        total = tl.sum(total * tl.exp(largest - shift), 0)
        tl.store(lse + row, shift + tl.log(total))
