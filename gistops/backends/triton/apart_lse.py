"""Pairs that cancel, in a loss: their tile's part of the log-sum-exp made anew, from w_k + δ_j written out.

As apart.py, but a program takes a whole class tile of the forward, since all its scores are in the same sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numbers import clamped_rnorm
from .partials import row_targets, store_partials, tile_partials, without_infinity


@triton.jit
def apart_lse_kernel(
    input,  # [B, d]
    centers,  # [K, d]
    displacements,  # [m, d]
    tau,  # one element
    input_rnorms,  # [B]
    logits,  # [B, K]
    slots,  # [B, K]
    center_rnorms,  # [M, K]
    target,  # [B]
    class_bias,  # [K], or unused
    class_weight,  # [K], or unused
    target_logits,  # [B]
    partials,  # [3, tiles, B]
    B,
    K,
    d,
    M,
    tiles,
    ignore_index,
    CLASSES: tl.constexpr,  # of a tile of the forward, a multiple of TILE_K
    TILE_K: tl.constexpr,
    TILE_B: tl.constexpr,
    TILE_D: tl.constexpr,
    ACC: tl.constexpr,
    PARK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SUMS: tl.constexpr,
):
    """A program: CLASSES classes, all features. Rewrites the tile if it holds such a pair.

    Norms of these pairs are replaced on the way. What is read of them later is the sign alone, which stays.
    """
    class_tile = tl.program_id(0)
    every = class_tile * CLASSES + tl.arange(0, CLASSES)
    depth = tl.arange(0, TILE_D)
    marked = tl.zeros((CLASSES,), tl.int32)
    for j in range(1, M):
        rnorm = tl.load(center_rnorms + tl.cast(j, tl.int64) * K + every, mask=every < K, other=0.0)
        marked = marked | (rnorm < 0).to(tl.int32)
    if tl.max(marked, 0) > 0:
        for start_row in range(0, B, TILE_B):
            rows = start_row + tl.arange(0, TILE_B)
            row_valid = rows < B
            f_tile = input + rows.to(tl.int64)[:, None] * d + depth[None, :]
            scale = tl.load(tau).to(ACC) * tl.load(input_rnorms + rows, mask=row_valid, other=0.0)
            places = row_targets(target, rows, row_valid, 0, ignore_index)
            largest = tl.full((TILE_B,), float("-inf"), ACC)
            total = tl.zeros((TILE_B,), ACC)
            weighted = tl.zeros((TILE_B,), ACC)
            for part in range(0, CLASSES, TILE_K):
                classes = class_tile * CLASSES + part + tl.arange(0, TILE_K)
                class_valid = classes < K
                w_tile = centers + classes.to(tl.int64)[:, None] * d + depth[None, :]
                best = tl.full((TILE_K, TILE_B), float("-inf"), ACC)
                slot = tl.zeros((TILE_K, TILE_B), tl.int32)
                for j in range(M):
                    products = tl.zeros((TILE_K, TILE_B), ACC)
                    squares = tl.zeros((TILE_K,), ACC)
                    for start in range(0, d, TILE_D):
                        inside = depth < d - start
                        w = tl.load(w_tile + start, mask=class_valid[:, None] & inside[None, :], other=0.0)
                        f = tl.load(f_tile + start, mask=row_valid[:, None] & inside[None, :], other=0.0)
                        delta = tl.load(
                            displacements + (j - 1) * d + start + depth, mask=inside & (j > 0), other=0.0
                        )
                        vector = w.to(ACC) + delta.to(ACC)[None, :]
                        squares += tl.sum(vector * vector, 1)
                        products = tl.dot(
                            vector, tl.trans(f.to(ACC)), products, input_precision="ieee", out_dtype=ACC
                        )
                    known = center_rnorms + tl.cast(j, tl.int64) * K + classes
                    rnorm = tl.load(known, mask=class_valid, other=0.0)
                    direct = clamped_rnorm(squares)
                    tl.store(known, -direct, mask=class_valid & (rnorm < 0))
                    score = products * tl.where(rnorm < 0, direct, rnorm)[:, None]
                    better = (score > best) | (score != score)
                    best = tl.where(better, score, best)
                    slot = tl.where(better, j, slot)
                z = best * scale[None, :]
                valid = row_valid[None, :] & class_valid[:, None]
                if PARK:
                    offsets = rows.to(tl.int64)[None, :] * K + classes[:, None]
                    tl.store(logits + offsets, z, mask=valid)
                    tl.store(slots + offsets, slot.to(tl.uint8), mask=valid)
                own = valid & (classes[:, None] == places[None, :])
                tl.store(target_logits + rows[None, :] + tl.zeros_like(slot), z, mask=own)
                more_largest, more_total, more_weighted = tile_partials(
                    z, classes, class_valid, places, class_bias, class_weight, HAS_BIAS, HAS_WEIGHT, SUMS
                )
                joint = tl.maximum(largest, more_largest)
                shift = without_infinity(joint)
                total = total * tl.exp(largest - shift) + more_total * tl.exp(more_largest - shift)
                largest = joint
                weighted += more_weighted
            store_partials(partials, largest, total, weighted, class_tile, tiles, rows, row_valid, B, SUMS)
