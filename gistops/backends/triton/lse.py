"""The loss's forward pass over the scores: from the product P to logits z and each row's partial log-sum-exps.

    z[k, i] = τ / |f_i| · max_j (P[k, i] + Q[i, j]) R[k, j]        P = W f', Q = f Δ', R = 1 / |w_k + δ_j|

P is computed by torch's library, class-major: its rows start at multiples of 16 elements whatever K is, and the sums
over classes stay within a thread up to their last step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .lse_partials import local_targets, merge_lse, store_class_sums, store_lse, tile_lse
from .max_over_slots import max_over_slots
from .numerics import load_tau


@triton.jit
def score_tile(
    products,
    classes,
    class_valid,
    rows,
    row_valid,
    scale,  # τ / |f_i|
    center_rnorms,
    shifts,
    B,
    K,
    M,
    UNROLLED_SLOTS: tl.constexpr,
):
    """Return logits z and slots of a tile of P [classes, rows]; 0 outside, where the memory of P is uninitialized."""
    best, slot = max_over_slots(
        products, classes, class_valid, rows, row_valid, center_rnorms, shifts, B, K, M, UNROLLED_SLOTS
    )
    valid = class_valid[:, None] & row_valid[None, :]
    z = tl.where(valid, best * scale[None, :], tl.zeros_like(best))
    return z, tl.where(valid, slot, tl.zeros_like(slot))


@triton.jit
def lse_kernel(
    scores,  # P [K, stride], overwritten by z with STASH; with SCORED z, 0 from B on
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
    stride,  # B rounded up to a multiple of 16
    M,
    group_tiles,  # class tiles per group
    first_class,  # the first class of the chunk
    first_group,  # the first group of the chunk
    groups,  # number of groups of all chunks
    ignore_index,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    UNROLLED_SLOTS: tl.constexpr,  # see max_over_slots
    ACC: tl.constexpr,
    STASH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SUMS: tl.constexpr,  # also sum weight·z, for label smoothing
    SCORED: tl.constexpr,  # scores holds logits; there is nothing to stash
):
    """Compute logits, and their partial log-sum-exps, of a group of class tiles and BLOCK_B rows.

    Grid: class groups x row tiles. Logits of pairs that cancel are wrong here; rescore_cancelled_lse_kernel recomputes
    the groups that hold such pairs.
    """
    row_tiles = tl.cdiv(B, BLOCK_B)
    row_tile = tl.program_id(0) % row_tiles
    group = tl.program_id(0) // row_tiles
    rows = row_tile * BLOCK_B + tl.arange(0, BLOCK_B)
    row_valid = rows < B
    scale = load_tau(tau, ACC) * tl.load(input_rnorms + rows, mask=row_valid, other=0.0)
    targets = local_targets(target, rows, row_valid, first_class, ignore_index)
    largest = tl.full((BLOCK_B,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_B,), ACC)
    weighted = tl.zeros((BLOCK_B,), ACC)
    target_z = tl.zeros((BLOCK_C, BLOCK_B), ACC)
    # Prefetch: the next tile is loaded while the current one is processed.
    columns = (rows < stride)[None, :]
    offsets = tl.arange(0, BLOCK_C)[:, None] * stride + rows[None, :]
    begin = group * group_tiles * BLOCK_C
    end = tl.minimum(begin + group_tiles * BLOCK_C, K)
    first_inside = (begin + tl.arange(0, BLOCK_C) < K)[:, None] & columns
    ahead = tl.load(scores + tl.cast(begin, tl.int64) * stride + offsets, mask=first_inside, other=0.0)
    for tile in range(group * group_tiles, group * group_tiles + group_tiles):
        classes = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        class_valid = classes < K
        start = tl.cast(tile, tl.int64) * BLOCK_C * stride
        valid = class_valid[:, None] & row_valid[None, :]
        # The stride is a multiple of 16; a mask by it, not by B, keeps loads and stores wide.
        inside = class_valid[:, None] & columns
        products = ahead
        next_inside = (classes + BLOCK_C < end)[:, None] & columns
        ahead = tl.load(scores + start + BLOCK_C * stride + offsets, mask=next_inside, other=0.0)
        if SCORED:
            z = products
        else:
            z, slot = score_tile(
                products,
                classes,
                class_valid,
                rows,
                row_valid,
                scale,
                center_rnorms,
                shifts,
                B,
                K,
                M,
                UNROLLED_SLOTS,
            )
            if STASH:
                tl.store(scores + start + offsets, z, mask=inside)
                # Four at a time, as scores are loaded: wider stores would send all slots through shared memory.
                narrow = tl.max_contiguous(offsets, (1, 4))
                tl.store(slots + start + narrow, slot.to(tl.uint8), mask=inside)
        is_target = valid & (classes[:, None] == targets[None, :])
        target_z += tl.where(is_target, z, tl.zeros_like(z))
        tile_largest, tile_total, tile_weighted = tile_lse(
            z, classes, class_valid, targets, class_bias, class_weight, HAS_BIAS, HAS_WEIGHT, SUMS
        )
        largest, total = merge_lse(largest, total, tile_largest, tile_total)
        weighted += tile_weighted
    group_start = group * group_tiles * BLOCK_C
    in_group = (
        row_valid & (targets >= group_start) & (targets < tl.minimum(group_start + group_tiles * BLOCK_C, K))
    )
    tl.store(target_logits + rows, tl.sum(target_z, 0), mask=in_group)
    store_lse(partials, largest, total, weighted, first_group + group, groups, rows, row_valid, B, SUMS)
    if SUMS:  # noqa: SIM102
        if row_tile == 0:
            store_class_sums(
                class_sums, group * group_tiles * BLOCK_C, group_tiles, K, class_bias, class_weight,
                first_group + group, groups, BLOCK_C, HAS_BIAS, HAS_WEIGHT,
            )  # fmt: skip
