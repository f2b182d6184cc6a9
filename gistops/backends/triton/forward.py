"""The forward: one pass over the centres for products, norms and the maximum.

    logits[i, k] = τ / |f_i| · max_j (P[i, k] + Q[i, j]) R[k, j]        P = f W', Q = f Δ', R = 1 / |w_k + δ_j|

The features' norm is a factor of the row, so that no normalised copy of them is made.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numbers import signed_rnorms


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
    B,
    K,
    d,
    M,
    TILE_K: tl.constexpr,
    TILE_B: tl.constexpr,
    TILE_D: tl.constexpr,
    SLOTS: tl.constexpr,  # slots whose norms are made here: 16, or 1 where m = 0, or none
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    NORM_PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A program: TILE_K classes, TILE_B features. The feature tiles of a class tile follow each other, for L2."""
    feature_tiles = tl.cdiv(B, TILE_B)
    feature_tiles = tl.where(feature_tiles > 0, feature_tiles, 1)  # without features, the norms are still due
    feature_tile = tl.program_id(0) % feature_tiles
    classes = tl.program_id(0) // feature_tiles * TILE_K + tl.arange(0, TILE_K)
    rows = feature_tile * TILE_B + tl.arange(0, TILE_B)
    depth = tl.arange(0, TILE_D)
    candidates = tl.arange(0, SLOTS if SLOTS > 0 else 1)
    class_valid = classes < K
    row_valid = rows < B

    w_tile = centers + classes.to(tl.int64)[:, None] * d + depth[None, :]
    f_tile = input + rows.to(tl.int64)[:, None] * d + depth[None, :]
    products = tl.zeros((TILE_K, TILE_B), ACC)
    if SLOTS > 0:
        squares = tl.zeros((TILE_K,), ACC)
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
            wide = w.to(ACC)
            squares += tl.sum(wide * wide, 1)

    if SLOTS > 0:
        if SLOTS > 1:
            lengths = tl.load(displacement_squares + candidates, mask=candidates < M, other=0.0)
            rnorms = signed_rnorms(squares, crossed, lengths)
        else:
            nothing = tl.zeros((1,), ACC)
            rnorms = signed_rnorms(squares, tl.zeros((TILE_K, 1), ACC), nothing)
        target = center_rnorms + candidates.to(tl.int64)[None, :] * K + classes[:, None]
        if feature_tile == 0:
            tl.store(target, rnorms, mask=(candidates < M)[None, :] & class_valid[:, None])

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
    offsets = rows.to(tl.int64)[None, :] * K + classes[:, None]
    valid = row_valid[None, :] & class_valid[:, None]
    tl.store(logits + offsets, best * scale[None, :], mask=valid)
    tl.store(slots + offsets, slot.to(tl.uint8), mask=valid)


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
