"""All norms and all products with displacements, of features and of centres, in one launch that reads each once.

Of features 1/|f_i| and f_i·δ_j, of centres 1/|w_k + δ_j|. It is bound by memory: tiles are small, so that several
programs a multiprocessor keep loads in flight, and what is summed over dimensions is reduced once, at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numbers import clamped_rnorm, signed_rnorms


@triton.jit
def sums(
    vectors,
    rows,
    valid,
    displacements,
    candidates,
    candidate_valid,
    d,
    TILE_R: tl.constexpr,
    TILE_D: tl.constexpr,
    SLOTS: tl.constexpr,
    ACC: tl.constexpr,
    NORM_PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """|x|² [rows], x·δ_j [rows, candidates] and |δ_j|² [candidates]."""
    depth = tl.arange(0, TILE_D)
    x_tile = vectors + rows.to(tl.int64)[:, None] * d + depth[None, :]
    delta_tile = displacements + (candidates[:, None] - 1) * d + depth[None, :]
    squares = tl.zeros((TILE_R, TILE_D), ACC)
    crossed = tl.zeros((TILE_R, SLOTS), ACC)
    lengths = tl.zeros((SLOTS, TILE_D), ACC)
    for start in range(0, d, TILE_D):
        inside = depth[None, :] < d - start
        x = tl.load(x_tile + start, mask=valid[:, None] & inside, other=0.0)
        if WIDEN:
            x = x.to(ACC)
        if SLOTS > 1:
            delta = tl.load(delta_tile + start, mask=candidate_valid[:, None] & inside, other=0.0)
            if WIDEN:
                delta = delta.to(ACC)
            crossed = tl.dot(x, tl.trans(delta), crossed, input_precision=NORM_PRECISION, out_dtype=ACC)
            long = delta.to(ACC)
            lengths += long * long
        wide = x.to(ACC)
        squares += wide * wide
    return tl.sum(squares, 1), crossed, tl.sum(lengths, 1)


@triton.jit
def every_norm_kernel(
    input,  # [B, d]
    centers,  # [K, d]
    displacements,  # [m, d]
    input_rnorms,  # [B]
    shifts,  # [M, B]: Q', f_i·δ_j, slot first so that a tile of features reads a run
    center_rnorms,  # [M, K]
    B,  # 0 where the features' are known
    K,
    d,
    M,
    TILE_R: tl.constexpr,
    TILE_D: tl.constexpr,
    SLOTS: tl.constexpr,  # 16, or 1 where m = 0
    ACC: tl.constexpr,
    NORM_PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A program: TILE_R features, or TILE_R classes, and SLOTS slots. Slot 0 is a displacement of zeros."""
    feature_tiles = (B + TILE_R - 1) // TILE_R
    tile = tl.program_id(0)
    candidates = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    delta_valid = (candidates > 0) & (candidates < M)
    if tile < feature_tiles:
        rows = tile * TILE_R + tl.arange(0, TILE_R)
        squares, crossed, _ = sums(
            input, rows, rows < B, displacements, candidates, delta_valid, d,
            TILE_R, TILE_D, SLOTS, ACC, NORM_PRECISION, WIDEN,
        )  # fmt: skip
        target = shifts + candidates.to(tl.int64)[None, :] * B + rows[:, None]
        tl.store(target, crossed, mask=(rows < B)[:, None] & (candidates < M)[None, :])
        if tl.program_id(1) == 0:
            tl.store(input_rnorms + rows, clamped_rnorm(squares), mask=rows < B)
    else:
        classes = (tile - feature_tiles) * TILE_R + tl.arange(0, TILE_R)
        squares, crossed, lengths = sums(
            centers, classes, classes < K, displacements, candidates, delta_valid, d,
            TILE_R, TILE_D, SLOTS, ACC, NORM_PRECISION, WIDEN,
        )  # fmt: skip
        target = center_rnorms + candidates.to(tl.int64)[None, :] * K + classes[:, None]
        known = (candidates < M)[None, :] & (classes < K)[:, None]
        tl.store(target, signed_rnorms(squares, crossed, lengths), mask=known)
