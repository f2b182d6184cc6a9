"""Pairs that cancel, in a loss: the partial log-sum-exps of the class groups that hold such pairs, recomputed.

The class-major counterpart of rescore_cancelled_kernel. A program recomputes a whole group of lse_kernel, because all
logits of the group are in the same partials.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cancellation import mark_cancelled, recomputed_logits
from .lse_partials import local_targets, merge_lse, store_lse, tile_lse


@triton.jit
def rescore_cancelled_lse_kernel(
    input,  # [B, d]
    centers,  # [K, d]
    displacements,  # [m, d]
    tau,  # one element
    input_rnorms,  # [B]
    scores,  # [K, stride]
    slots,  # [K, stride]
    center_rnorms,  # [M, K]
    target,  # [B]
    class_bias,  # [K], or unused
    class_weight,  # [K], or unused
    target_logits,  # [B]
    partials,  # [3, groups, B]
    B,
    K,
    d,
    stride,
    M,
    group_tiles,  # class tiles per group
    first_class,  # the first class of the chunk
    first_group,  # the first group of the chunk
    groups,  # number of groups of all chunks
    ignore_index,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    STASH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Overwrite logits and partials of a class group in which a pair cancels. Grid: class groups."""
    group = tl.program_id(0)
    start = group * group_tiles
    marks = tl.zeros((BLOCK_C,), tl.int32)
    for tile in range(start, start + group_tiles):
        classes = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        marks = mark_cancelled(marks, center_rnorms, classes, classes < K, K, M)
    if tl.max(marks, 0) > 0:
        for start_row in range(0, B, BLOCK_B):
            rows = start_row + tl.arange(0, BLOCK_B)
            row_valid = rows < B
            targets = local_targets(target, rows, row_valid, first_class, ignore_index)
            largest = tl.full((BLOCK_B,), float("-inf"), ACC)
            total = tl.zeros((BLOCK_B,), ACC)
            weighted = tl.zeros((BLOCK_B,), ACC)
            for tile in range(start, start + group_tiles):
                classes = tile * BLOCK_C + tl.arange(0, BLOCK_C)
                class_valid = classes < K
                z, slot = recomputed_logits(
                    input, centers, displacements, center_rnorms, input_rnorms, tau, classes, class_valid, rows, row_valid,
                    K, d, M, BLOCK_C, BLOCK_B, BLOCK_D, ACC,
                )  # fmt: skip
                valid = row_valid[None, :] & class_valid[:, None]
                if STASH:
                    offsets = classes.to(tl.int64)[:, None] * stride + rows[None, :]
                    tl.store(scores + offsets, z, mask=valid)
                    tl.store(slots + offsets, slot.to(tl.uint8), mask=valid)
                is_target = valid & (classes[:, None] == targets[None, :])
                tl.store(target_logits + rows[None, :] + tl.zeros_like(slot), z, mask=is_target)
                tile_largest, tile_total, tile_weighted = tile_lse(
                    z, classes, class_valid, targets, class_bias, class_weight, HAS_BIAS, HAS_WEIGHT, SUMS
                )
                largest, total = merge_lse(largest, total, tile_largest, tile_total)
                weighted += tile_weighted
            store_lse(
                partials, largest, total, weighted, first_group + group, groups, rows, row_valid, B, SUMS
            )
