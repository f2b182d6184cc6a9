"""The backward's one pass over the scores of a loss: it computes the gradient of the logits and routes it.

The gradient is a function of the logits, of what the forward saved of each row, and of the gradients of loss and lse.
It is stored for pairs that cancel only; otherwise it becomes routed weights and their sums at once (route_logits_grad.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cancellation import any_cancelled
from .lse_partials import local_targets
from .numerics import load_tau
from .route_logits_grad import bound_weights, select_rnorm
from .row_loss import BY_LOGIT, BY_MARGIN, BY_TAU, EXCESS, LSE_OTHERS


@triton.jit
def row_factors(
    rows,
    row_valid,
    grad_loss,  # one element, or [B] with grad_stride; or unused
    grad_stride,
    grad_lse,  # [B] with lse_stride, or unused
    lse_stride,
    saved,  # from row_loss_kernel
    scalars,  # from row_loss_kernel and reduce_loss_kernel
    target,  # [B]
    class_weight,  # [K], or unused
    B,
    num_classes,  # number of classes of all chunks
    ignore_index,
    SMOOTHING: tl.constexpr,
    MEAN: tl.constexpr,
    HAS_LOSS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """Return for each row: the factors of exp(z - O) and of the class weights, the target's gradient, and O."""
    ACC: tl.constexpr = saved.dtype.element_ty
    lse_others = tl.load(saved + LSE_OTHERS * B + rows, mask=row_valid, other=0.0)
    excess = tl.load(saved + EXCESS * B + rows, mask=row_valid, other=0.0)
    p_others = 1.0 / (1.0 + tl.exp(-excess))  # the probability of all classes but the target
    p_target = 1.0 / (1.0 + tl.exp(excess))
    d_lse = tl.zeros_like(lse_others)
    d_loss = tl.zeros_like(lse_others)
    d_sums = tl.zeros_like(lse_others)
    weight = tl.full(lse_others.shape, 1.0, ACC)
    if HAS_LSE:
        d_lse = tl.load(grad_lse + rows.to(tl.int64) * lse_stride, mask=row_valid, other=0.0).to(ACC)
    if HAS_LOSS:
        y = tl.load(target + rows, mask=row_valid, other=0).to(tl.int64)
        counted = row_valid & (y != ignore_index) & (y >= 0) & (y < num_classes)
        d_loss = tl.load(grad_loss + rows.to(tl.int64) * grad_stride, mask=row_valid, other=0.0).to(ACC)
        if MEAN:
            d_loss = d_loss / tl.load(scalars)
        d_loss = tl.where(counted, d_loss, tl.zeros_like(d_loss))
        if HAS_WEIGHT:
            weight = tl.load(class_weight + y, mask=counted, other=0.0).to(ACC)
        if SMOOTHING > 0:
            d_sums = d_loss * (-SMOOTHING / tl.cast(num_classes, ACC))
            d_lse -= d_sums * tl.load(scalars + 1)
            d_loss = d_loss * (1 - SMOOTHING)
        d_loss = d_loss * weight
    factor = (d_loss + d_lse) * p_others
    d_target = d_lse * p_target - d_loss * p_others + d_sums * weight
    return factor, d_sums, d_target, lse_others


@triton.jit
def margin_factors(rows, row_valid, saved, B):
    """Return the derivatives of the target logit with margin by the logit without margin, by τ and by the margin."""
    stride = tl.cast(B, tl.int64)
    by_logit = tl.load(saved + BY_LOGIT * stride + rows, mask=row_valid, other=0.0)
    by_tau = tl.load(saved + BY_TAU * stride + rows, mask=row_valid, other=0.0)
    by_margin = tl.load(saved + BY_MARGIN * stride + rows, mask=row_valid, other=0.0)
    return by_logit, by_tau, by_margin


@triton.jit
def accumulate_slot(
    j,
    slot,
    h,
    u,
    slot_weight,  # S' [slots, rows]
    slot_ids,
    moments,
    split,
    classes,
    class_valid,
    K,
    M,
    NEED_SLOT_WEIGHTS: tl.constexpr,
    NEED_MOMENTS: tl.constexpr,
):
    """Return S' with the tile's sums of slot j added. Store the tile's U of slot j."""
    won = slot == j
    if NEED_SLOT_WEIGHTS:
        tile_sum = tl.sum(tl.where(won, h, tl.zeros_like(h)), 0)
        slot_weight += tl.where(slot_ids[:, None] == j, tile_sum[None, :], tl.zeros_like(slot_weight))
    if NEED_MOMENTS:
        moment = tl.sum(tl.where(won, u, tl.zeros_like(u)), 1)
        first = (split * M + j).to(tl.int64) * K
        tl.store(moments + first + classes, moment, mask=class_valid)
    return slot_weight


@triton.jit
def route_loss_grad_kernel(
    grad,  # G [K, stride]: written for pairs that cancel; unused if M is 1
    scores,  # z [K, stride]
    slots,  # [K, stride]
    center_rnorms,  # [M, K]
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
    if HAS_MARGIN:
        by_logit, by_tau, by_margin = margin_factors(rows, row_valid, saved, B)
        d_logit = d_target * by_logit
    slot_weight = tl.zeros((BLOCK_S, BLOCK_B), ACC)
    total = tl.zeros((BLOCK_C, BLOCK_B), ACC)
    zero_tile = tl.zeros((BLOCK_C, BLOCK_B), ACC)
    # S' of unrolled slots, a tile in registers for each slot; reduced over classes once, at the end.
    slot_tile0, slot_tile1, slot_tile2, slot_tile3 = zero_tile, zero_tile, zero_tile, zero_tile
    slot_tile4, slot_tile5, slot_tile6, slot_tile7 = zero_tile, zero_tile, zero_tile, zero_tile
    flag = tl.cast(0, tl.int32)
    group_cancels = any_cancelled(center_rnorms, group * group_tiles * BLOCK_C, group_tiles * BLOCK_C, K, M)
    for tile in range(group * group_tiles, group * group_tiles + group_tiles):
        classes = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        class_valid = classes < K
        valid = class_valid[:, None] & row_valid[None, :]
        start = tl.cast(tile, tl.int64) * BLOCK_C * stride
        offsets = tl.arange(0, BLOCK_C)[:, None] * stride + rows[None, :]
        # The stride is a multiple of 16; a mask by it, not by B, keeps loads wide. Columns from B on are masked later.
        inside = class_valid[:, None] & (rows < stride)[None, :]
        z = tl.load(scores + start + offsets, mask=inside, other=0.0)
        # Four at a time, as scores are loaded: wider access would send slots and weights through shared memory.
        narrow = tl.max_contiguous(offsets, (1, 4))
        slot = tl.load(slots + start + narrow, mask=inside, other=0).to(tl.int32)
        slot = tl.minimum(slot, M - 1)  # slots from a caller must not lead to a read out of bounds
        # Selection, because an indexed load would change the tile's layout.
        rnorm = tl.zeros((BLOCK_C, BLOCK_B), ACC)
        if UNROLLED_SLOTS > 0:
            for j in tl.static_range(UNROLLED_SLOTS):
                rnorm = select_rnorm(rnorm, slot, j, center_rnorms, classes, class_valid, K, 1)
        else:
            for j in range(M):
                rnorm = select_rnorm(rnorm, slot, j, center_rnorms, classes, class_valid, K, 1)
        score = z
        if HAS_BIAS:
            bias = tl.load(class_bias + (first_class + classes), mask=class_valid, other=0.0)
            score = score + bias.to(ACC)[:, None]
        g = factor[None, :] * tl.exp(score - lse_others[None, :])
        if SMOOTHING > 0:
            smoothing_term = tl.zeros_like(g) + d_sums[None, :]
            if HAS_WEIGHT:
                weight = tl.load(class_weight + (first_class + classes), mask=class_valid, other=0.0)
                smoothing_term = smoothing_term * weight.to(ACC)[:, None]
            g += smoothing_term
        is_target = valid & (classes[:, None] == targets[None, :])
        zeros = tl.zeros_like(g)
        if NEED_BIAS:
            d_bias = tl.sum(tl.where(valid, tl.where(is_target, d_target[None, :], g), zeros), 1)
            tl.store(bias_partials + tl.cast(split, tl.int64) * K + classes, d_bias, mask=class_valid)
        if NEED_MARGIN:
            d_margin = tl.sum(tl.where(is_target, (d_target * by_margin)[None, :], zeros), 1)
            tl.store(margin_partials + tl.cast(split, tl.int64) * K + classes, d_margin, mask=class_valid)
        g = tl.where(valid, tl.where(is_target, d_logit[None, :], g), zeros)
        cancels = valid & (rnorm < 0)
        if group_cancels:  # almost never
            tl.store(grad + start + offsets, g, mask=cancels)
            flag = flag | tl.max(tl.max(cancels.to(tl.int32), 1), 0)
        h = tl.where(cancels, zeros, scale[None, :] * g * tl.abs(rnorm))
        if MAX_WEIGHT > 0:
            h = bound_weights(h, rnorm, input_rnorm, 0, MAX_WEIGHT)
        h = tl.where(valid, h, zeros)
        if NEED_WEIGHTS:
            tl.store(weights + start + narrow, h.to(weights.dtype.element_ty), mask=inside)
        u = g * z
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
                for j in tl.static_range(UNROLLED_SLOTS):
                    accumulate_slot(
                        j, slot, h, u, slot_weight, slot_ids, moments, split, classes, class_valid, K, M,
                        False, NEED_MOMENTS,
                    )  # fmt: skip
            else:
                for j in range(M):
                    slot_weight = accumulate_slot(
                        j, slot, h, u, slot_weight, slot_ids, moments, split, classes, class_valid, K, M,
                        NEED_SLOT_WEIGHTS, NEED_MOMENTS,
                    )  # fmt: skip
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
