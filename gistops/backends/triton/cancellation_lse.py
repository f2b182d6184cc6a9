"""Pairs that cancel, in a loss: their group's part of the log-sum-exp made anew, from w_k + δ_j written out.

As cancellation.py, for class-major scores. A program takes a whole group of lse.py, since all its scores are in the same sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cancellation import recomputed_scores
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
    run,
    first,
    first_group,
    groups,
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
    """A program: a group of classes, all features. Does anything only if the group holds such a pair.

    Norms of these pairs are replaced on the way. What is read of them later is the sign alone, which stays.
    """
    group = tl.program_id(0)
    start = group * run
    marks = tl.zeros((BLOCK_C,), tl.int32)
    for tile in range(start, start + run):
        classes = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        for j in range(1, M):
            rnorm = tl.load(center_rnorms + tl.cast(j, tl.int64) * K + classes, mask=classes < K, other=0.0)
            marks = marks | (rnorm < 0).to(tl.int32)
    if tl.max(marks, 0) > 0:
        for start_row in range(0, B, BLOCK_B):
            rows = start_row + tl.arange(0, BLOCK_B)
            row_valid = rows < B
            scale = tl.load(tau).to(ACC) * tl.load(input_rnorms + rows, mask=row_valid, other=0.0)
            places = local_targets(target, rows, row_valid, first, ignore_index)
            largest = tl.full((BLOCK_B,), float("-inf"), ACC)
            total = tl.zeros((BLOCK_B,), ACC)
            weighted = tl.zeros((BLOCK_B,), ACC)
            for tile in range(start, start + run):
                classes = tile * BLOCK_C + tl.arange(0, BLOCK_C)
                class_valid = classes < K
                best, slot = recomputed_scores(
                    input, centers, displacements, center_rnorms, classes, class_valid, rows, row_valid, K, d, M,
                    BLOCK_C, BLOCK_B, BLOCK_D, ACC,
                )  # fmt: skip
                z = best * scale[None, :]
                valid = row_valid[None, :] & class_valid[:, None]
                if STASH:
                    offsets = classes.to(tl.int64)[:, None] * stride + rows[None, :]
                    tl.store(scores + offsets, z, mask=valid)
                    tl.store(slots + offsets, slot.to(tl.uint8), mask=valid)
                own = valid & (classes[:, None] == places[None, :])
                tl.store(target_logits + rows[None, :] + tl.zeros_like(slot), z, mask=own)
                more = tile_lse(
                    z, classes, class_valid, places, class_bias, class_weight, HAS_BIAS, HAS_WEIGHT, SUMS
                )
                largest, total = merge_lse(largest, total, more[0], more[1])
                weighted += more[2]
            store_lse(
                partials, largest, total, weighted, first_group + group, groups, rows, row_valid, B, SUMS
            )
