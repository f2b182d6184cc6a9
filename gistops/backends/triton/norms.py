"""All norms and all products with displacements, of features and of centres, in one launch that reads each once.

Of features 1/|f_i| and f_i·δ_j, of centres 1/|w_k + δ_j|. It is bound by memory: tiles are small, so that several
programs a multiprocessor keep loads in flight, and what is summed over dimensions is reduced once, at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import clamped_rnorm, signed_rnorms


@triton.jit
def squares_and_products(
    vectors,
    rows,
    valid,
    displacements,
    candidates,
    candidate_valid,
    d,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ACC: tl.constexpr,
    NORM_PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """|x|² [rows], x·δ_j [rows, candidates] and |δ_j|² [candidates]."""
    dims = tl.arange(0, BLOCK_D)
    x_tile = vectors + rows.to(tl.int64)[:, None] * d + dims[None, :]
    delta_tile = displacements + (candidates[:, None] - 1) * d + dims[None, :]
    squares = tl.zeros((BLOCK_R, BLOCK_D), ACC)
    crossed = tl.zeros((BLOCK_R, BLOCK_S), ACC)
    lengths = tl.zeros((BLOCK_S, BLOCK_D), ACC)
    for start in range(0, d, BLOCK_D):
        inside = dims[None, :] < d - start
        x = tl.load(x_tile + start, mask=valid[:, None] & inside, other=0.0)
        if WIDEN:
            x = x.to(ACC)
        if BLOCK_S > 1:
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
def norms_kernel(
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
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,  # 16, or 1 where m = 0
    ACC: tl.constexpr,
    NORM_PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A program: BLOCK_R features, or BLOCK_R classes, and BLOCK_S slots. Slot 0 is a displacement of zeros."""
    row_tiles = (B + BLOCK_R - 1) // BLOCK_R
    tile = tl.program_id(0)
    candidates = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    delta_valid = (candidates > 0) & (candidates < M)
    if tile < row_tiles:
        rows = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        squares, crossed, _ = squares_and_products(
            input, rows, rows < B, displacements, candidates, delta_valid, d,
            BLOCK_R, BLOCK_D, BLOCK_S, ACC, NORM_PRECISION, WIDEN,
        )  # fmt: skip
        target = shifts + candidates.to(tl.int64)[None, :] * B + rows[:, None]
        tl.store(target, crossed, mask=(rows < B)[:, None] & (candidates < M)[None, :])
        if tl.program_id(1) == 0:
            tl.store(input_rnorms + rows, clamped_rnorm(squares), mask=rows < B)
    else:
        classes = (tile - row_tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
        squares, crossed, lengths = squares_and_products(
            centers, classes, classes < K, displacements, candidates, delta_valid, d,
            BLOCK_R, BLOCK_D, BLOCK_S, ACC, NORM_PRECISION, WIDEN,
        )  # fmt: skip
        target = center_rnorms + candidates.to(tl.int64)[None, :] * K + classes[:, None]
        known = (candidates < M)[None, :] & (classes < K)[:, None]
        tl.store(target, signed_rnorms(squares, crossed, lengths), mask=known)


@triton.jit
def signed_rnorm(square, product, displacement_square):
    """As `signed_rnorms`, of one displacement."""
    apart = square + displacement_square
    squares = apart + 2.0 * product
    cancelled = squares < apart * 0.125
    one = tl.full(squares.shape, 1.0, squares.dtype)
    return tl.where(cancelled, -one, clamped_rnorm(tl.where(cancelled, one, squares)))


@triton.jit
def norms_in_registers_kernel(
    input,  # [B, d]
    centers,  # [K, d]
    displacements,  # [m, d]
    input_rnorms,  # [B]
    shifts,  # [M, B]
    center_rnorms,  # [M, K]
    B,  # 0 where the features' are known
    K,
    d,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,  # at least d
    UNROLLED_SLOTS: tl.constexpr,  # M
    ACC: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """As norms_kernel, for few displacements: vectors stay in registers, so that all loads are under way at once.

    A warp has whole rows. There is no loop over dimensions, hence no barrier, and sums go across lanes only.
    """
    row_tiles = (B + BLOCK_R - 1) // BLOCK_R
    tile = tl.program_id(0)
    dims = tl.arange(0, BLOCK_D)
    inside = dims < d
    if tile < row_tiles:
        rows = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        valid = rows < B
        place = input + rows.to(tl.int64)[:, None] * d + dims[None, :]
        f = tl.load(place, mask=valid[:, None] & inside[None, :], other=0.0)
        if WIDEN:
            f = f.to(ACC)
        wide = f.to(ACC)
        tl.store(input_rnorms + rows, clamped_rnorm(tl.sum(wide * wide, 1)), mask=valid)
        tl.store(shifts + rows, tl.zeros((BLOCK_R,), ACC), mask=valid)
        for j in tl.static_range(1, UNROLLED_SLOTS):
            delta = tl.load(displacements + (j - 1) * d + dims, mask=inside, other=0.0).to(ACC)
            tl.store(shifts + j * B + rows, tl.sum(f.to(ACC) * delta[None, :], 1), mask=valid)
    else:
        classes = (tile - row_tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
        valid = classes < K
        place = centers + classes.to(tl.int64)[:, None] * d + dims[None, :]
        w = tl.load(place, mask=valid[:, None] & inside[None, :], other=0.0)
        if WIDEN:
            w = w.to(ACC)
        wide = w.to(ACC)
        square = tl.sum(wide * wide, 1)
        tl.store(center_rnorms + classes, clamped_rnorm(square), mask=valid)
        for j in tl.static_range(1, UNROLLED_SLOTS):
            delta = tl.load(displacements + (j - 1) * d + dims, mask=inside, other=0.0).to(ACC)
            product = tl.sum(w.to(ACC) * delta[None, :], 1)
            rnorm = signed_rnorm(square, product, tl.sum(delta * delta, 0))
            tl.store(center_rnorms + tl.cast(j, tl.int64) * K + classes, rnorm, mask=valid)
