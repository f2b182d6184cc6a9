"""The loss's forward as one kernel: a tile of P = W f' becomes partial log-sum-exps without a pass over [K, B].

Tiles are small, 16 products per thread, because logits, slots and sums take registers beside the products. Logits and
slots are stored for a backward that reads them, and otherwise not at all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import tile_products
from .lse import score_tile, stash_tile
from .lse_partials import local_targets, store_class_sums, store_lse, tile_lse
from .numerics import load_tau


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
    rows = row_tile * BLOCK_B + tl.arange(0, BLOCK_B)
    row_valid = rows < B
    products = tile_products(
        input, centers, classes, class_valid, rows, row_valid, d,
        BLOCK_C, BLOCK_B, BLOCK_D, ACC, PRECISION, WIDEN,
    )  # fmt: skip
    scale = load_tau(tau, ACC) * tl.load(input_rnorms + rows, mask=row_valid, other=0.0)
    targets = local_targets(target, rows, row_valid, first_class, ignore_index)
    z, slot = score_tile(
        products, classes, class_valid, rows, row_valid, scale, center_rnorms, shifts, B, K, M, UNROLLED_SLOTS
    )  # fmt: skip
    if STASH:
        offsets = tl.arange(0, BLOCK_C)[:, None] * stride + rows[None, :]
        inside = class_valid[:, None] & (rows < stride)[None, :]
        stash_tile(scores, slots, z, slot, tl.cast(group, tl.int64) * BLOCK_C * stride, offsets, inside)
    is_target = class_valid[:, None] & (classes[:, None] == targets[None, :])
    target_z = tl.sum(tl.where(is_target, z, tl.zeros_like(z)), 0)
    in_tile = row_valid & (targets >= group * BLOCK_C) & (targets < tl.minimum(group * BLOCK_C + BLOCK_C, K))
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
