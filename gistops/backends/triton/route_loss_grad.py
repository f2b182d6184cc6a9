"""The backward's one pass over the scores of a loss: it computes the gradient of the logits and routes it.

The gradient is stored for pairs that cancel only; otherwise it becomes routed weights and their sums at once
(loss_grad_tile.py, route_logits_grad.py). Scores that were not kept come from the product, which torch's library has
computed again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cancellation import any_cancelled
from .loss_grad_tile import loss_grad_tile, margin_factors, row_factors, store_by_class, store_moments
from .lse import score_tile
from .lse_partials import local_targets
from .numerics import load_tau


@triton.jit
def route_loss_grad_kernel(
    grad,  # G [K, stride]: written for pairs that cancel; unused if M is 1
    scores,  # z [K, stride]; with PRODUCTS P, but z in groups in which a pair cancels
    slots,  # [K, stride]; with PRODUCTS only in groups in which a pair cancels
    center_rnorms,  # [M, K]
    shifts,  # [M, B], or unused without PRODUCTS
    input_rnorms,  # [B]
    tau,  # one element
    weights,  # H' [K, stride], or unused
    slot_weights,  # [groups, M, B]: partials of S', or unused
    moments,  # [splits, M, K]: partials of U, or unused
    tau_partials,  # [splits, groups]: partials of τ ∂τ, or unused
    bias_partials,  # [splits, K], or unused
    margin_partials,  # [splits, K], or unused
    flags,  # [splits, groups]: 1 if a pair that cancels has won there
    grad_loss,
    grad_lse,
    saved,
    scalars,
    target,
    class_bias,
    class_weight,
    B,
    K,
    stride,
    M,
    group_tiles,  # class tiles per group
    grad_stride,
    lse_stride,
    first_class,  # the first class of the chunk
    num_classes,  # number of classes of all chunks
    ignore_index,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,  # M rounded up to a power of two
    UNROLLED_SLOTS: tl.constexpr,  # M if it is small, so that loops over slots are unrolled; otherwise 0
    PRODUCTS: tl.constexpr,  # scores holds products
    MAX_WEIGHT: tl.constexpr,  # the largest float16 if H' is float16; otherwise 0
    SMOOTHING: tl.constexpr,
    MEAN: tl.constexpr,
    HAS_LOSS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_MARGIN: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
    NEED_SLOT_WEIGHTS: tl.constexpr,
    NEED_MOMENTS: tl.constexpr,
    NEED_TAU: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    NEED_MARGIN: tl.constexpr,
    INTERLEAVED: tl.constexpr,  # sub-centers: center_rnorms and moments are [K, M], and no pair cancels
):
    """Compute H', and partials of its sums, of BLOCK_B rows (a split) and a group of class tiles, class-major.

    Grid: class groups x splits. See route_logits_grad.py for H', S' and U.
    """
    ACC: tl.constexpr = saved.dtype.element_ty
    splits = tl.cdiv(B, BLOCK_B)
    split = tl.program_id(0) % splits
    group = tl.program_id(0) // splits
    groups = tl.num_programs(0) // splits
    rows = split * BLOCK_B + tl.arange(0, BLOCK_B)
    row_valid = rows < B
    slot_ids = tl.arange(0, BLOCK_S)
    input_rnorm = tl.load(input_rnorms + rows, mask=row_valid, other=0.0)
    scale = load_tau(tau, ACC) * input_rnorm
    targets = local_targets(target, rows, row_valid, first_class, ignore_index)
    factor, d_sums, d_target, lse_others = row_factors(
        rows, row_valid, grad_loss, grad_stride, grad_lse, lse_stride, saved, scalars, target, class_weight,
        B, num_classes, ignore_index, SMOOTHING, MEAN, HAS_LOSS, HAS_LSE, HAS_WEIGHT,
    )  # fmt: skip
    d_logit = d_target
    d_margin = d_target
    if HAS_MARGIN:
        by_logit, by_tau, by_margin = margin_factors(rows, row_valid, saved, B)
        d_logit = d_target * by_logit
        d_margin = d_target * by_margin
    slot_weight = tl.zeros((BLOCK_S, BLOCK_B), ACC)
    total = tl.zeros((BLOCK_C, BLOCK_B), ACC)
    zero_tile = tl.zeros((BLOCK_C, BLOCK_B), ACC)
    # S' of unrolled slots, a tile in registers for each slot; reduced over classes once, at the end.
    slot_tile0, slot_tile1, slot_tile2, slot_tile3 = zero_tile, zero_tile, zero_tile, zero_tile
    slot_tile4, slot_tile5, slot_tile6, slot_tile7 = zero_tile, zero_tile, zero_tile, zero_tile
    flag = tl.cast(0, tl.int32)
    group_cancels = False
    if not INTERLEAVED:
        group_cancels = any_cancelled(
            center_rnorms, group * group_tiles * BLOCK_C, group_tiles * BLOCK_C, K, M
        )
    for tile in range(group * group_tiles, group * group_tiles + group_tiles):
        classes = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        class_valid = classes < K
        start = tl.cast(tile, tl.int64) * BLOCK_C * stride
        offsets = tl.arange(0, BLOCK_C)[:, None] * stride + rows[None, :]
        # The stride is a multiple of 16; a mask by it, not by B, keeps loads wide. Columns from B on are masked later.
        inside = class_valid[:, None] & (rows < stride)[None, :]
        z = tl.load(scores + start + offsets, mask=inside, other=0.0)
        # Four at a time, as scores are loaded: wider access would send slots and weights through shared memory.
        narrow = tl.max_contiguous(offsets, (1, 4))
        if PRODUCTS:
            if group_cancels:
                slot = tl.load(slots + start + narrow, mask=inside, other=0).to(tl.int32)
                z = tl.where(row_valid[None, :], z, tl.zeros_like(z))  # uninitialized from B on
            else:
                z, slot = score_tile(
                    z,
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
        else:
            slot = tl.load(slots + start + narrow, mask=inside, other=0).to(tl.int32)
        slot = tl.minimum(slot, M - 1)  # slots from a caller must not lead to a read out of bounds
        g, h, cancels, d_bias, d_class_margin = loss_grad_tile(
            z, slot, classes, class_valid, row_valid, targets, scale, input_rnorm, factor, d_sums, d_target, d_logit,
            d_margin, lse_others, center_rnorms, class_bias, class_weight,
            first_class, K, M, UNROLLED_SLOTS, MAX_WEIGHT, SMOOTHING, HAS_BIAS, HAS_WEIGHT, NEED_BIAS, NEED_MARGIN,
            INTERLEAVED,
        )  # fmt: skip
        if NEED_BIAS:
            store_by_class(bias_partials, d_bias, split, classes, class_valid, K)
        if NEED_MARGIN:
            store_by_class(margin_partials, d_class_margin, split, classes, class_valid, K)
        if group_cancels:  # almost never
            tl.store(grad + start + offsets, g, mask=cancels)
            flag = flag | tl.max(tl.max(cancels.to(tl.int32), 1), 0)
        if NEED_WEIGHTS:
            tl.store(weights + start + narrow, h.to(weights.dtype.element_ty), mask=inside)
        u = g * z
        zeros = tl.zeros_like(h)
        if NEED_SLOT_WEIGHTS or NEED_MOMENTS:
            if UNROLLED_SLOTS > 0:
                if NEED_SLOT_WEIGHTS:
                    slot_tile0 += tl.where(slot == 0, h, zeros)
                    if UNROLLED_SLOTS > 1:
                        slot_tile1 += tl.where(slot == 1, h, zeros)
                    if UNROLLED_SLOTS > 2:
                        slot_tile2 += tl.where(slot == 2, h, zeros)
                    if UNROLLED_SLOTS > 3:
                        slot_tile3 += tl.where(slot == 3, h, zeros)
                    if UNROLLED_SLOTS > 4:
                        slot_tile4 += tl.where(slot == 4, h, zeros)
                    if UNROLLED_SLOTS > 5:
                        slot_tile5 += tl.where(slot == 5, h, zeros)
                    if UNROLLED_SLOTS > 6:
                        slot_tile6 += tl.where(slot == 6, h, zeros)
                    if UNROLLED_SLOTS > 7:
                        slot_tile7 += tl.where(slot == 7, h, zeros)
                if NEED_MOMENTS:
                    for j in tl.static_range(UNROLLED_SLOTS):
                        store_moments(moments, j, slot, u, split, classes, class_valid, K, M, INTERLEAVED)
            else:
                for j in range(M):
                    if NEED_SLOT_WEIGHTS:
                        tile_sum = tl.sum(tl.where(slot == j, h, zeros), 0)
                        slot_weight += tl.where(
                            slot_ids[:, None] == j, tile_sum[None, :], tl.zeros_like(slot_weight)
                        )
                    if NEED_MOMENTS:
                        store_moments(moments, j, slot, u, split, classes, class_valid, K, M, INTERLEAVED)
        if NEED_TAU:
            total += u
    if NEED_SLOT_WEIGHTS:
        if UNROLLED_SLOTS > 0:
            ptrs = slot_weights + tl.cast(group, tl.int64) * UNROLLED_SLOTS * B + rows
            tl.store(ptrs, tl.sum(slot_tile0, 0), mask=row_valid)
            if UNROLLED_SLOTS > 1:
                tl.store(ptrs + B, tl.sum(slot_tile1, 0), mask=row_valid)
            if UNROLLED_SLOTS > 2:
                tl.store(ptrs + 2 * B, tl.sum(slot_tile2, 0), mask=row_valid)
            if UNROLLED_SLOTS > 3:
                tl.store(ptrs + 3 * B, tl.sum(slot_tile3, 0), mask=row_valid)
            if UNROLLED_SLOTS > 4:
                tl.store(ptrs + 4 * B, tl.sum(slot_tile4, 0), mask=row_valid)
            if UNROLLED_SLOTS > 5:
                tl.store(ptrs + 5 * B, tl.sum(slot_tile5, 0), mask=row_valid)
            if UNROLLED_SLOTS > 6:
                tl.store(ptrs + 6 * B, tl.sum(slot_tile6, 0), mask=row_valid)
            if UNROLLED_SLOTS > 7:
                tl.store(ptrs + 7 * B, tl.sum(slot_tile7, 0), mask=row_valid)
        else:
            ptrs = slot_weights + (group * M + slot_ids).to(tl.int64)[:, None] * B + rows[None, :]
            tl.store(ptrs, slot_weight, mask=row_valid[None, :] & (slot_ids < M)[:, None])
    if NEED_TAU:
        sums = tl.sum(tl.sum(total, 1), 0)
        if HAS_MARGIN:  # noqa: SIM102
            if (group == 0) & (first_class == 0):
                sums += tl.sum(d_target * by_tau, 0) * load_tau(tau, ACC)
        tl.store(tau_partials + split * groups + group, sums)
    tl.store(flags + split * groups + group, flag)
