"""The loss's forward as one kernel: a tile of P = W f' becomes partial log-sum-exps without a pass over [K, B].

The epilogue works on a few rows of the tile at a time, because logits, slots and sums of a whole tile do not fit the
registers beside the products. Logits and slots are stored for a backward that reads them, and otherwise not at all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import tile_products
from .lse import score_tile, stash_tile
from .lse_partials import local_targets, store_class_sums, store_lse, tile_lse
from .numerics import load_tau


@triton.jit
def halves(x):
    """Return the first and the second half of the columns of a tile."""
    return tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)).split()


@triton.jit
def quarters(x):
    """Return the four quarters of the columns of a tile."""
    a, b = halves(x)
    return halves(a) + halves(b)


@triton.jit
def column_parts(x, PARTS: tl.constexpr):
    """Return a tuple of PARTS tiles, 1, 2, 4, 8 or 16, that divide the columns of a tile."""
    if PARTS == 1:
        parts = (x,)
    elif PARTS == 2:
        parts = halves(x)
    else:
        q = quarters(x)
        if PARTS == 4:
            parts = q
        elif PARTS == 8:
            parts = halves(q[0]) + halves(q[1]) + halves(q[2]) + halves(q[3])
        else:
            parts = quarters(q[0]) + quarters(q[1]) + quarters(q[2]) + quarters(q[3])
    return parts


@triton.jit
def fused_lse_kernel(
    input,  # [B, d]
    centers,  # [K, d]
    scores,  # z [K, stride]: written with STASH
    slots,  # [K, stride]: written with STASH
    center_rnorms,  # [M, K]
    shifts,  # [M, B]
    input_rnorms,  # [B]
    tau,  # one element
    target,  # [B]
    class_bias,  # [K], or unused
    class_weight,  # [K], or unused
    target_logits,  # [B]: written for rows whose target is in this chunk
    partials,  # [3, groups, B]
    class_sums,  # [2, groups]
    B,
    K,
    d,
    stride,  # B rounded up to a multiple of 16
    M,
    first_class,  # the first class of the chunk
    first_group,  # the first group of the chunk
    groups,  # number of groups of all chunks
    ignore_index,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,  # parts of the rows that the epilogue takes one after the other
    UNROLLED_SLOTS: tl.constexpr,  # M
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    STASH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SUMS: tl.constexpr,  # also sum weight·z, for label smoothing
):
    """Compute the partial log-sum-exps of one class tile, which is a group here, and BLOCK_B rows.

    Grid: class tiles x row tiles. Consecutive programs share a class tile, so that its centers stay in L2.
    rescore_cancelled_lse_kernel recomputes class tiles in which a pair cancels, as it does for lse_kernel.
    """
    row_tiles = tl.cdiv(B, BLOCK_B)
    row_tile = tl.program_id(0) % row_tiles
    group = tl.program_id(0) // row_tiles
    classes = group * BLOCK_C + tl.arange(0, BLOCK_C)
    class_valid = classes < K
    tile_rows = row_tile * BLOCK_B + tl.arange(0, BLOCK_B)
    products = tile_products(
        input, centers, classes, class_valid, tile_rows, tile_rows < B, d,
        BLOCK_C, BLOCK_B, BLOCK_D, ACC, PRECISION, WIDEN,
    )  # fmt: skip
    parts = column_parts(products, PARTS)
    PART_B: tl.constexpr = BLOCK_B // PARTS
    for part in tl.static_range(PARTS):
        if part > 0:
            tl.debug_barrier()  # keeps the compiler from interleaving the parts, which would spill
        rows = row_tile * BLOCK_B + part * PART_B + tl.arange(0, PART_B)
        row_valid = rows < B
        scale = load_tau(tau, ACC) * tl.load(input_rnorms + rows, mask=row_valid, other=0.0)
        targets = local_targets(target, rows, row_valid, first_class, ignore_index)
        z, slot = score_tile(
            parts[part], classes, class_valid, rows, row_valid, scale, center_rnorms, shifts, B, K, M, UNROLLED_SLOTS
        )  # fmt: skip
        if STASH:
            offsets = tl.arange(0, BLOCK_C)[:, None] * stride + rows[None, :]
            inside = class_valid[:, None] & (rows < stride)[None, :]
            stash_tile(scores, slots, z, slot, tl.cast(group, tl.int64) * BLOCK_C * stride, offsets, inside)
        is_target = class_valid[:, None] & (classes[:, None] == targets[None, :])
        target_z = tl.sum(tl.where(is_target, z, tl.zeros_like(z)), 0)
        in_tile = (
            row_valid & (targets >= group * BLOCK_C) & (targets < tl.minimum(group * BLOCK_C + BLOCK_C, K))
        )
        tl.store(target_logits + rows, target_z, mask=in_tile)
        largest, total, weighted = tile_lse(
            z, classes, class_valid, targets, class_bias, class_weight, HAS_BIAS, HAS_WEIGHT, SUMS
        )
        store_lse(partials, largest, total, weighted, first_group + group, groups, rows, row_valid, B, SUMS)
    if SUMS:  # noqa: SIM102
        if row_tile == 0:
            store_class_sums(
                class_sums, group * BLOCK_C, 1, K, class_bias, class_weight, first_group + group, groups,
                BLOCK_C, HAS_BIAS, HAS_WEIGHT,
            )  # fmt: skip
