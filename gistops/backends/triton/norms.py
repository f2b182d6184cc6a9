"""Norms of rows and of centers, and their products with the displacements, in one launch that reads each vector once.

For rows: 1 / |f_i| and f_i·δ_j. For classes: 1 / |w_k + δ_j|. The launch is bound by memory, so tiles are small: several
programs per multiprocessor keep loads in flight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import clamped_rnorm, signed_rnorm


@triton.jit
def squares_and_products(
    vectors,
    rows,
    valid,
    displacements,
    slots,
    slot_valid,
    d,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ACC: tl.constexpr,
    NORM_PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Return |x|² [rows], x·δ_j [rows, slots] and |δ_j|² [slots]."""
    dims = tl.arange(0, BLOCK_D)
    x_ptrs = vectors + rows.to(tl.int64)[:, None] * d + dims[None, :]
    delta_ptrs = displacements + (slots[:, None] - 1) * d + dims[None, :]
    squares = tl.zeros((BLOCK_R, BLOCK_D), ACC)
    products = tl.zeros((BLOCK_R, BLOCK_S), ACC)
    delta_squares = tl.zeros((BLOCK_S, BLOCK_D), ACC)
    for start in range(0, d, BLOCK_D):
        inside = dims[None, :] < d - start
        x = tl.load(x_ptrs + start, mask=valid[:, None] & inside, other=0.0)
        if WIDEN:
            x = x.to(ACC)
        if BLOCK_S > 1:
            delta = tl.load(delta_ptrs + start, mask=slot_valid[:, None] & inside, other=0.0)
            if WIDEN:
                delta = delta.to(ACC)
            products = tl.dot(x, tl.trans(delta), products, input_precision=NORM_PRECISION, out_dtype=ACC)
            wide_delta = delta.to(ACC)
            delta_squares += wide_delta * wide_delta
        wide = x.to(ACC)
        squares += wide * wide
    return tl.sum(squares, 1), products, tl.sum(delta_squares, 1)


@triton.jit
def norms_kernel(
    input,  # [B, d]
    centers,  # [K, d]
    displacements,  # [m, d]
    input_rnorms,  # [B]
    shifts,  # [M, B]: Q', the products f_i·δ_j, slot first so that a tile of rows reads contiguous memory
    center_rnorms,  # [M, K]
    B,  # 0 if input_rnorms and shifts are known
    K,  # 0 if center_rnorms are known
    d,
    M,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,  # 16, or 1 if m is 0
    ACC: tl.constexpr,
    NORM_PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Compute norms in a loop over the dimensions.

    Grid: (tiles of BLOCK_R rows, then tiles of BLOCK_R classes; tiles of BLOCK_S slots). Slot 0 has a displacement of zero.
    """
    row_tiles = (B + BLOCK_R - 1) // BLOCK_R
    tile = tl.program_id(0)
    slots = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    delta_valid = (slots > 0) & (slots < M)
    if tile < row_tiles:
        rows = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        squares, products, _ = squares_and_products(
            input, rows, rows < B, displacements, slots, delta_valid, d,
            BLOCK_R, BLOCK_D, BLOCK_S, ACC, NORM_PRECISION, WIDEN,
        )  # fmt: skip
        ptrs = shifts + slots.to(tl.int64)[None, :] * B + rows[:, None]
        tl.store(ptrs, products, mask=(rows < B)[:, None] & (slots < M)[None, :])
        if tl.program_id(1) == 0:
            tl.store(input_rnorms + rows, clamped_rnorm(squares), mask=rows < B)
    else:
        classes = (tile - row_tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
        squares, products, delta_squares = squares_and_products(
            centers, classes, classes < K, displacements, slots, delta_valid, d,
            BLOCK_R, BLOCK_D, BLOCK_S, ACC, NORM_PRECISION, WIDEN,
        )  # fmt: skip
        ptrs = center_rnorms + slots.to(tl.int64)[None, :] * K + classes[:, None]
        mask = (slots < M)[None, :] & (classes < K)[:, None]
        tl.store(ptrs, signed_rnorm(squares[:, None], products, delta_squares[None, :]), mask=mask)


@triton.jit
def load_vectors(vectors, rows, valid, dims, inside, d, ACC: tl.constexpr, WIDEN: tl.constexpr):
    """Return some rows of `vectors` [n, d]: a tile [rows, dims]."""
    ptrs = vectors + rows.to(tl.int64)[:, None] * d + dims[None, :]
    x = tl.load(ptrs, mask=valid[:, None] & inside[None, :], other=0.0)
    if WIDEN:
        x = x.to(ACC)
    return x


@triton.jit
def norms_in_registers_kernel(
    input,  # [B, d]
    centers,  # [K, d]
    displacements,  # [m, d]
    input_rnorms,  # [B]
    shifts,  # [M, B]
    center_rnorms,  # [M, K]
    B,  # 0 if input_rnorms and shifts are known
    K,  # 0 if center_rnorms are known
    d,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,  # at least d
    UNROLLED_SLOTS: tl.constexpr,  # M
    ACC: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Compute the same norms with whole vectors in registers, for few displacements. All loads are issued at once.

    Each warp holds whole vectors, so that sums need no barrier. Grid: tiles of BLOCK_R rows, then tiles of BLOCK_R classes.
    """
    row_tiles = (B + BLOCK_R - 1) // BLOCK_R
    tile = tl.program_id(0)
    dims = tl.arange(0, BLOCK_D)
    inside = dims < d
    if tile < row_tiles:
        rows = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        valid = rows < B
        f = load_vectors(input, rows, valid, dims, inside, d, ACC, WIDEN)
        wide = f.to(ACC)
        tl.store(input_rnorms + rows, clamped_rnorm(tl.sum(wide * wide, 1)), mask=valid)
        tl.store(shifts + rows, tl.zeros((BLOCK_R,), ACC), mask=valid)
        for j in tl.static_range(1, UNROLLED_SLOTS):
            delta = tl.load(displacements + (j - 1) * d + dims, mask=inside, other=0.0).to(ACC)
            tl.store(shifts + j * B + rows, tl.sum(f.to(ACC) * delta[None, :], 1), mask=valid)
    else:
        classes = (tile - row_tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
        valid = classes < K
        w = load_vectors(centers, classes, valid, dims, inside, d, ACC, WIDEN)
        wide = w.to(ACC)
        square = tl.sum(wide * wide, 1)
        tl.store(center_rnorms + classes, clamped_rnorm(square), mask=valid)
        for j in tl.static_range(1, UNROLLED_SLOTS):
            delta = tl.load(displacements + (j - 1) * d + dims, mask=inside, other=0.0).to(ACC)
            product = tl.sum(w.to(ACC) * delta[None, :], 1)
            rnorm = signed_rnorm(square, product, tl.sum(delta * delta, 0))
            tl.store(center_rnorms + tl.cast(j, tl.int64) * K + classes, rnorm, mask=valid)
