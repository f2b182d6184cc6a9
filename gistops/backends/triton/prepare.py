"""What the forward needs of features and displacements alone: 1/|f_i|, f_i·δ_j and |δ_j|²."""

from __future__ import annotations

import triton
import triton.language as tl

from .numbers import clamped_rnorm


@triton.jit
def prepare_kernel(
    input,  # [B, d]
    displacements,  # [m, d]
    input_rnorms,  # [B]
    shifts,  # [M, B]: Q', f_i·δ_j, slot first so that a tile of features reads a run
    displacement_squares,  # [M]
    B,
    d,
    M,
    TILE_B: tl.constexpr,
    TILE_D: tl.constexpr,
    SLOTS: tl.constexpr,
    ACC: tl.constexpr,
    NORM_PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A program: TILE_B features, SLOTS slots. Slot 0, the bare centre, is a displacement of zeros."""
    rows = tl.program_id(0) * TILE_B + tl.arange(0, TILE_B)
    slots = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    depth = tl.arange(0, TILE_D)
    row_valid = rows < B
    slot_valid = slots < M
    features = input + rows.to(tl.int64)[:, None] * d + depth[None, :]
    structure = displacements + (slots[:, None] - 1) * d + depth[None, :]
    structure_valid = (slots > 0) & slot_valid

    products = tl.zeros((TILE_B, SLOTS), ACC)
    squares = tl.zeros((TILE_B,), ACC)
    structure_squares = tl.zeros((SLOTS,), ACC)
    for start in range(0, d, TILE_D):
        inside = depth[None, :] < d - start
        f = tl.load(features + start, mask=row_valid[:, None] & inside, other=0.0)
        delta = tl.load(structure + start, mask=structure_valid[:, None] & inside, other=0.0)
        if WIDEN:
            f = f.to(ACC)
            delta = delta.to(ACC)
        products = tl.dot(f, tl.trans(delta), products, input_precision=NORM_PRECISION, out_dtype=ACC)
        wide = f.to(ACC)
        squares += tl.sum(wide * wide, 1)
        wide_delta = delta.to(ACC)
        structure_squares += tl.sum(wide_delta * wide_delta, 1)

    target = shifts + slots.to(tl.int64)[None, :] * B + rows[:, None]
    tl.store(target, products, mask=row_valid[:, None] & slot_valid[None, :])
    # A branch here and below, since the interpreter of Triton 3.9 takes no mask that was joined with a scalar.
    if tl.program_id(1) == 0:
        tl.store(input_rnorms + rows, clamped_rnorm(squares), mask=row_valid)
    if tl.program_id(0) == 0:
        tl.store(displacement_squares + slots, structure_squares, mask=slot_valid)
