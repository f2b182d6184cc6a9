"""The forward: one pass over the centres for products, norms and the maximum.

    logits[i, k] = τ / |f_i| · max_j (P[i, k] + Q[i, j]) R[k, j]        P = f W', Q = f Δ', R = 1 / |w_k + δ_j|

The features' norm is a factor of the row, so that no normalised copy of them is made. For a loss (LSE) the tile's part
of each row's log-sum-exp is made here too, and logits are kept for the backward, or (not PARK) not at all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numbers import signed_rnorms
from .partials import row_targets, store_class_sums, store_partials, tile_partials


@triton.jit
def forward_kernel(
    input,  # [B, d]
    centers,  # [K, d]
    displacements,  # [m, d]
    tau,  # one element
    input_rnorms,  # [B]
    shifts,  # [M, B]
    displacement_squares,  # [M]
    logits,  # [B, K]
    slots,  # [B, K]
    center_rnorms,  # [M, K]: written if SLOTS > 0, otherwise read
    target,  # [B]; this and what follows only with LSE
    class_bias,  # [K], or unused
    class_weight,  # [K], or unused
    target_logits,  # [B]: of the rows whose target is here
    partials,  # [3, tiles, B]
    class_sums,  # [2, tiles]
    B,
    K,
    d,
    M,
    tiles,
    ignore_index,
    TILE_K: tl.constexpr,
    TILE_B: tl.constexpr,
    TILE_D: tl.constexpr,
    SLOTS: tl.constexpr,  # slots whose norms are made here: 16, or 1 where m = 0, or none
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    NORM_PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    LSE: tl.constexpr,
    PARK: tl.constexpr,  # store logits and slots
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SUMS: tl.constexpr,  # of weight z, for label smoothing
):
    """A program: TILE_K classes, TILE_B features. The feature tiles of a class tile follow each other, for L2."""
    feature_tiles = tl.cdiv(B, TILE_B)
    feature_tiles = tl.where(feature_tiles > 0, feature_tiles, 1)  # without features, the norms are still due
    feature_tile = tl.program_id(0) % feature_tiles
    class_tile = tl.program_id(0) // feature_tiles
    classes = class_tile * TILE_K + tl.arange(0, TILE_K)
    rows = feature_tile * TILE_B + tl.arange(0, TILE_B)
    depth = tl.arange(0, TILE_D)
    candidates = tl.arange(0, SLOTS if SLOTS > 0 else 1)
    class_valid = classes < K
    row_valid = rows < B

    w_tile = centers + classes.to(tl.int64)[:, None] * d + depth[None, :]
    f_tile = input + rows.to(tl.int64)[:, None] * d + depth[None, :]
    products = tl.zeros((TILE_K, TILE_B), ACC)
    if SLOTS > 0:
        # What a thread loads at once it adds up itself; across threads sums go once, after the loop.
        RUN: tl.constexpr = 128 // centers.dtype.element_ty.primitive_bitwidth
        square_parts = tl.zeros((TILE_K, TILE_D // RUN), ACC)
    if SLOTS > 1:
        delta_tile = displacements + (candidates[:, None] - 1) * d + depth[None, :]
        delta_valid = (candidates > 0) & (candidates < M)
        crossed = tl.zeros((TILE_K, SLOTS), ACC)
    for start in range(0, d, TILE_D):
        inside = depth[None, :] < d - start
        w = tl.load(w_tile + start, mask=class_valid[:, None] & inside, other=0.0)
        f = tl.load(f_tile + start, mask=row_valid[:, None] & inside, other=0.0)
        if WIDEN:
            w = w.to(ACC)
            f = f.to(ACC)
        products = tl.dot(w, tl.trans(f), products, input_precision=PRECISION, out_dtype=ACC)
        if SLOTS > 1:
            delta = tl.load(delta_tile + start, mask=delta_valid[:, None] & inside, other=0.0)
            if WIDEN:
                delta = delta.to(ACC)
            crossed = tl.dot(w, tl.trans(delta), crossed, input_precision=NORM_PRECISION, out_dtype=ACC)
        if SLOTS > 0:
            wide = tl.reshape(w.to(ACC), (TILE_K, TILE_D // RUN, RUN))
            square_parts += tl.sum(wide * wide, 2)

    if SLOTS > 0:
        squares = tl.sum(square_parts, 1)
        if SLOTS > 1:
            lengths = tl.load(displacement_squares + candidates, mask=candidates < M, other=0.0)
            rnorms = signed_rnorms(squares, crossed, lengths)
        else:
            nothing = tl.zeros((1,), ACC)
            rnorms = signed_rnorms(squares, tl.zeros((TILE_K, 1), ACC), nothing)
        norms = center_rnorms + candidates.to(tl.int64)[None, :] * K + classes[:, None]
        if feature_tile == 0:
            tl.store(norms, rnorms, mask=(candidates < M)[None, :] & class_valid[:, None])

    # Scores of pairs that cancel are wrong here, and made anew by apart_kernel.
    if SLOTS == 1:
        best = products * tl.sum(rnorms, 1)[:, None]
        slot = tl.zeros((TILE_K, TILE_B), tl.int32)
    else:
        best = tl.full((TILE_K, TILE_B), float("-inf"), ACC)
        slot = tl.zeros((TILE_K, TILE_B), tl.int32)
        for j in range(M):
            if SLOTS > 0:
                rnorm = tl.sum(tl.where(candidates[None, :] == j, rnorms, tl.zeros_like(rnorms)), 1)
            else:
                rnorm = tl.load(
                    center_rnorms + tl.cast(j, tl.int64) * K + classes, mask=class_valid, other=0.0
                )
            shift = tl.load(shifts + tl.cast(j, tl.int64) * B + rows, mask=row_valid, other=0.0)
            score = (products + shift[None, :]) * rnorm[:, None]
            # The lowest of equals wins, and NaN gets through, as in torch.max.
            better = (score > best) | (score != score)
            best = tl.where(better, score, best)
            slot = tl.where(better, j, slot)

    scale = tl.load(tau).to(ACC) * tl.load(input_rnorms + rows, mask=row_valid, other=0.0)
    z = best * scale[None, :]
    offsets = rows.to(tl.int64)[None, :] * K + classes[:, None]
    valid = row_valid[None, :] & class_valid[:, None]
    if PARK:
        tl.store(logits + offsets, z, mask=valid)
        tl.store(slots + offsets, slot.to(tl.uint8), mask=valid)
    if LSE:
        places = row_targets(target, rows, row_valid, 0, ignore_index)
        own = valid & (classes[:, None] == places[None, :])
        tl.store(target_logits + rows[None, :] + tl.zeros_like(slot), z, mask=own)
        largest, total, weighted = tile_partials(
            z, classes, class_valid, places, class_bias, class_weight, HAS_BIAS, HAS_WEIGHT, SUMS
        )
        store_partials(partials, largest, total, weighted, class_tile, tiles, rows, row_valid, B, SUMS)
        if SUMS:
            if feature_tile == 0:
                store_class_sums(
                    class_sums, classes, class_valid, class_bias, class_weight, class_tile, tiles,
                    HAS_BIAS, HAS_WEIGHT,
                )  # fmt: skip


@triton.jit
def norms_kernel(
    centers,  # [K, d]
    displacements,  # [m, d]
    displacement_squares,  # [M]
    center_rnorms,  # [M, K]
    K,
    d,
    M,
    TILE_K: tl.constexpr,
    TILE_D: tl.constexpr,
    SLOTS: tl.constexpr,
    ACC: tl.constexpr,
    NORM_PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The norms where there are more slots than the forward takes along. A program: TILE_K classes, SLOTS slots."""
    classes = tl.program_id(0) * TILE_K + tl.arange(0, TILE_K)
    candidates = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    depth = tl.arange(0, TILE_D)
    class_valid = classes < K
    delta_valid = (candidates > 0) & (candidates < M)
    w_tile = centers + classes.to(tl.int64)[:, None] * d + depth[None, :]
    delta_tile = displacements + (candidates[:, None] - 1) * d + depth[None, :]
    squares = tl.zeros((TILE_K,), ACC)
    crossed = tl.zeros((TILE_K, SLOTS), ACC)
    for start in range(0, d, TILE_D):
        inside = depth[None, :] < d - start
        w = tl.load(w_tile + start, mask=class_valid[:, None] & inside, other=0.0)
        delta = tl.load(delta_tile + start, mask=delta_valid[:, None] & inside, other=0.0)
        if WIDEN:
            w = w.to(ACC)
            delta = delta.to(ACC)
        crossed = tl.dot(w, tl.trans(delta), crossed, input_precision=NORM_PRECISION, out_dtype=ACC)
        wide = w.to(ACC)
        squares += tl.sum(wide * wide, 1)
    lengths = tl.load(displacement_squares + candidates, mask=candidates < M, other=0.0)
    target = center_rnorms + candidates.to(tl.int64)[None, :] * K + classes[:, None]
    valid = (candidates < M)[None, :] & class_valid[:, None]
    tl.store(target, signed_rnorms(squares, crossed, lengths), mask=valid)
