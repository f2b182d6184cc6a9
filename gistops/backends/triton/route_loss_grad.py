"""The gradient of the scores, from scores, what the forward kept of each row, and the gradients of loss and lse.

It is never written, but for pairs that cancel: one pass turns scores into routed weights and their sums (route_logits_grad.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .lse_partials import local_targets
from .numerics import is_clamped
from .row_loss import BY_LOGIT, BY_MARGIN, BY_TAU, EXCESS, SHIFT


@triton.jit
def row_factors(
    rows,
    row_valid,
    grad_loss,  # one element, or [B] by a stride; unused if there is none
    grad_stride,
    grad_lse,  # [B] by a stride; unused if there is none
    lse_stride,
    saved,  # of row_loss_kernel
    scalars,  # likewise
    target,  # [B]
    class_weight,  # [K], or unused
    B,
    every_class,  # K, of all chunks
    ignore_index,
    SMOOTHING: tl.constexpr,
    MEAN: tl.constexpr,
    HAS_LOSS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """Each [rows]: factors of exp(z - O) and of the class weights, the target's gradient, and O."""
    ACC: tl.constexpr = saved.dtype.element_ty
    shift = tl.load(saved + SHIFT * B + rows, mask=row_valid, other=0.0)
    excess = tl.load(saved + EXCESS * B + rows, mask=row_valid, other=0.0)
    others = 1.0 / (1.0 + tl.exp(-excess))  # the probability of all but the target
    own = 1.0 / (1.0 + tl.exp(excess))
    of_lse = tl.zeros_like(shift)
    of_loss = tl.zeros_like(shift)
    of_sums = tl.zeros_like(shift)
    weight = tl.full(shift.shape, 1.0, ACC)
    if HAS_LSE:
        of_lse = tl.load(grad_lse + rows.to(tl.int64) * lse_stride, mask=row_valid, other=0.0).to(ACC)
    if HAS_LOSS:
        y = tl.load(target + rows, mask=row_valid, other=0).to(tl.int64)
        counted = row_valid & (y != ignore_index) & (y >= 0) & (y < every_class)
        of_loss = tl.load(grad_loss + rows.to(tl.int64) * grad_stride, mask=row_valid, other=0.0).to(ACC)
        if MEAN:
            of_loss = of_loss / tl.load(scalars)
        of_loss = tl.where(counted, of_loss, tl.zeros_like(of_loss))
        if HAS_WEIGHT:
            weight = tl.load(class_weight + y, mask=counted, other=0.0).to(ACC)
        if SMOOTHING > 0:
            of_sums = of_loss * (-SMOOTHING / tl.cast(every_class, ACC))
            of_lse -= of_sums * tl.load(scalars + 1)
            of_loss = of_loss * (1 - SMOOTHING)
        of_loss = of_loss * weight
    factor = (of_loss + of_lse) * others
    of_target = of_lse * own - of_loss * others + of_sums * weight
    return factor, of_sums, of_target, shift


@triton.jit
def margin_factors(rows, row_valid, saved, B):
    """Derivatives of the apply_margin logit by logit, τ and margin."""
    stride = tl.cast(B, tl.int64)
    by_logit = tl.load(saved + BY_LOGIT * stride + rows, mask=row_valid, other=0.0)
    by_tau = tl.load(saved + BY_TAU * stride + rows, mask=row_valid, other=0.0)
    by_margin = tl.load(saved + BY_MARGIN * stride + rows, mask=row_valid, other=0.0)
    return by_logit, by_tau, by_margin


@triton.jit
def any_marked(center_rnorms, start, count, K, M):
    """True if any of these classes is of a pair that cancels."""
    lanes = tl.arange(0, 256)
    marks = tl.zeros((256,), tl.int32)
    for j in range(1, M):
        for skip in range(start, start + count, 256):
            classes = skip + lanes
            inside = (classes < K) & (classes < start + count)
            rnorm = tl.load(center_rnorms + tl.cast(j, tl.int64) * K + classes, mask=inside, other=0.0)
            marks = marks | (rnorm < 0).to(tl.int32)
    return tl.max(marks, 0) > 0


@triton.jit
def of_slot(
    j,
    slot,
    h,
    u,
    share,  # S' [slots, features]
    candidates,
    moments,
    split,
    classes,
    class_valid,
    K,
    M,
    NEED_SHARES: tl.constexpr,
    NEED_MOMENTS: tl.constexpr,
):
    """S' with the tile's part of slot j; U of slot j is stored."""
    won = slot == j
    if NEED_SHARES:
        part = tl.sum(tl.where(won, h, tl.zeros_like(h)), 0)
        share += tl.where(candidates[:, None] == j, part[None, :], tl.zeros_like(share))
    if NEED_MOMENTS:
        moment = tl.sum(tl.where(won, u, tl.zeros_like(u)), 1)
        row = (split * M + j).to(tl.int64) * K
        tl.store(moments + row + classes, moment, mask=class_valid)
    return share


@triton.jit
def route_loss_grad_kernel(
    grad,  # [K, stride]: written where pairs cancel; unused if M is 1
    scores,  # z [K, stride]
    slots,  # [K, stride]
    center_rnorms,  # [M, K]
    input_rnorms,  # [B]
    tau,  # one element
    weights,  # H' [K, stride], or unused
    shares,  # [groups, M, B]: parts of S', or unused
    moments,  # [splits, M, K]: parts of U, or unused
    totals,  # [splits, groups]: parts of τ ∂τ, or unused
    bias_parts,  # [splits, K]: parts of the gradient of the bias, or unused
    margin_parts,  # [splits, K]: likewise of the margin
    flags,  # [splits, groups]: whether pairs that cancel have won there
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
    run,  # class tiles a group
    grad_stride,
    lse_stride,
    first,  # class of the chunk
    every_class,
    ignore_index,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,  # M, rounded up to a power of two
    UNROLLED_SLOTS: tl.constexpr,  # M where that is small, so that nothing is left of loops over slots; otherwise 0
    MAX_WEIGHT: tl.constexpr,  # of the dtype of H', where that is float16; otherwise 0
    SMOOTHING: tl.constexpr,
    MEAN: tl.constexpr,
    HAS_LOSS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_MARGIN: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
    NEED_SHARES: tl.constexpr,
    NEED_MOMENTS: tl.constexpr,
    NEED_TOTALS: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    NEED_MARGIN: tl.constexpr,
):
    """As route_logits_grad_kernel, class by class, and with G made here. A program: BLOCK_B features, a group of class tiles."""
    ACC: tl.constexpr = saved.dtype.element_ty
    splits = tl.cdiv(B, BLOCK_B)
    split = tl.program_id(0) % splits
    group = tl.program_id(0) // splits
    groups = tl.num_programs(0) // splits
    rows = split * BLOCK_B + tl.arange(0, BLOCK_B)
    row_valid = rows < B
    candidates = tl.arange(0, BLOCK_S)
    input_rnorm = tl.load(input_rnorms + rows, mask=row_valid, other=0.0)
    scale = tl.load(tau).to(ACC) * input_rnorm
    places = local_targets(target, rows, row_valid, first, ignore_index)
    factor, of_sums, of_target, shift = row_factors(
        rows, row_valid, grad_loss, grad_stride, grad_lse, lse_stride, saved, scalars, target, class_weight,
        B, every_class, ignore_index, SMOOTHING, MEAN, HAS_LOSS, HAS_LSE, HAS_WEIGHT,
    )  # fmt: skip
    of_logit = of_target
    if HAS_MARGIN:
        by_logit, by_tau, by_margin = margin_factors(rows, row_valid, saved, B)
        of_logit = of_target * by_logit
    share = tl.zeros((BLOCK_S, BLOCK_B), ACC)
    total = tl.zeros((BLOCK_C, BLOCK_B), ACC)
    nothing = tl.zeros((BLOCK_C, BLOCK_B), ACC)
    share0, share1, share2, share3 = nothing, nothing, nothing, nothing
    share4, share5, share6, share7 = nothing, nothing, nothing, nothing
    flag = tl.cast(0, tl.int32)
    any_cancels = any_marked(center_rnorms, group * run * BLOCK_C, run * BLOCK_C, K, M)
    for tile in range(group * run, group * run + run):
        classes = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        class_valid = classes < K
        valid = class_valid[:, None] & row_valid[None, :]
        start = tl.cast(tile, tl.int64) * BLOCK_C * stride
        offsets = tl.arange(0, BLOCK_C)[:, None] * stride + rows[None, :]
        # A mask by the stride, a multiple of 16, keeps loads wide whatever B; what lies beyond B is zero.
        inside = class_valid[:, None] & (rows < stride)[None, :]
        z = tl.load(scores + start + offsets, mask=inside, other=0.0)
        # Four at a time, as scores are read: wider access would send what is narrower through shared memory.
        narrow = tl.max_contiguous(offsets, (1, 4))
        slot = tl.load(slots + start + narrow, mask=inside, other=0).to(tl.int32)
        slot = tl.minimum(slot, M - 1)  # an operator called by hand must not read elsewhere
        # By selection: to gather them would turn the layout of the tile around.
        rnorm = tl.zeros((BLOCK_C, BLOCK_B), ACC)
        if UNROLLED_SLOTS > 0:
            for j in tl.static_range(UNROLLED_SLOTS):
                known = tl.load(
                    center_rnorms + tl.cast(j, tl.int64) * K + classes, mask=class_valid, other=0.0
                )
                rnorm = tl.where(slot == j, known[:, None], rnorm)
        else:
            for j in range(M):
                known = tl.load(
                    center_rnorms + tl.cast(j, tl.int64) * K + classes, mask=class_valid, other=0.0
                )
                rnorm = tl.where(slot == j, known[:, None], rnorm)
        score = z
        if HAS_BIAS:
            bias = tl.load(class_bias + (first + classes), mask=class_valid, other=0.0)
            score = score + bias.to(ACC)[:, None]
        g = factor[None, :] * tl.exp(score - shift[None, :])
        if SMOOTHING > 0:
            spread = tl.zeros_like(g) + of_sums[None, :]
            if HAS_WEIGHT:
                weight = tl.load(class_weight + (first + classes), mask=class_valid, other=0.0)
                spread = spread * weight.to(ACC)[:, None]
            g += spread
        own = valid & (classes[:, None] == places[None, :])
        zeros = tl.zeros_like(g)
        if NEED_BIAS:
            of_bias = tl.sum(tl.where(valid, tl.where(own, of_target[None, :], g), zeros), 1)
            tl.store(bias_parts + tl.cast(split, tl.int64) * K + classes, of_bias, mask=class_valid)
        if NEED_MARGIN:
            of_margin = tl.sum(tl.where(own, (of_target * by_margin)[None, :], zeros), 1)
            tl.store(margin_parts + tl.cast(split, tl.int64) * K + classes, of_margin, mask=class_valid)
        g = tl.where(valid, tl.where(own, of_logit[None, :], g), zeros)
        cancels = valid & (rnorm < 0)
        if any_cancels:  # almost never
            tl.store(grad + start + offsets, g, mask=cancels)
            flag = flag | tl.max(tl.max(cancels.to(tl.int32), 1), 0)
        h = tl.where(cancels, zeros, scale[None, :] * g * tl.abs(rnorm))
        if MAX_WEIGHT > 0:  # as in route_logits_grad_kernel
            bounded = tl.minimum(tl.maximum(h, -MAX_WEIGHT), MAX_WEIGHT)
            extreme = (is_clamped(rnorm) | is_clamped(input_rnorm)[None, :]) & (h == h)
            h = tl.where(extreme, bounded, h)
        h = tl.where(valid, h, zeros)
        if NEED_WEIGHTS:
            tl.store(weights + start + narrow, h.to(weights.dtype.element_ty), mask=inside)
        u = g * z
        if NEED_SHARES or NEED_MOMENTS:
            if UNROLLED_SLOTS > 0:
                if NEED_SHARES:
                    share0 += tl.where(slot == 0, h, zeros)
                    if UNROLLED_SLOTS > 1:
                        share1 += tl.where(slot == 1, h, zeros)
                    if UNROLLED_SLOTS > 2:
                        share2 += tl.where(slot == 2, h, zeros)
                    if UNROLLED_SLOTS > 3:
                        share3 += tl.where(slot == 3, h, zeros)
                    if UNROLLED_SLOTS > 4:
                        share4 += tl.where(slot == 4, h, zeros)
                    if UNROLLED_SLOTS > 5:
                        share5 += tl.where(slot == 5, h, zeros)
                    if UNROLLED_SLOTS > 6:
                        share6 += tl.where(slot == 6, h, zeros)
                    if UNROLLED_SLOTS > 7:
                        share7 += tl.where(slot == 7, h, zeros)
                for j in tl.static_range(UNROLLED_SLOTS):
                    of_slot(
                        j, slot, h, u, share, candidates, moments, split, classes, class_valid, K, M,
                        False, NEED_MOMENTS,
                    )  # fmt: skip
            else:
                for j in range(M):
                    share = of_slot(
                        j, slot, h, u, share, candidates, moments, split, classes, class_valid, K, M,
                        NEED_SHARES, NEED_MOMENTS,
                    )  # fmt: skip
        if NEED_TOTALS:
            total += u
    if NEED_SHARES:
        if UNROLLED_SLOTS > 0:
            place = shares + tl.cast(group, tl.int64) * UNROLLED_SLOTS * B + rows
            tl.store(place, tl.sum(share0, 0), mask=row_valid)
            if UNROLLED_SLOTS > 1:
                tl.store(place + B, tl.sum(share1, 0), mask=row_valid)
            if UNROLLED_SLOTS > 2:
                tl.store(place + 2 * B, tl.sum(share2, 0), mask=row_valid)
            if UNROLLED_SLOTS > 3:
                tl.store(place + 3 * B, tl.sum(share3, 0), mask=row_valid)
            if UNROLLED_SLOTS > 4:
                tl.store(place + 4 * B, tl.sum(share4, 0), mask=row_valid)
            if UNROLLED_SLOTS > 5:
                tl.store(place + 5 * B, tl.sum(share5, 0), mask=row_valid)
            if UNROLLED_SLOTS > 6:
                tl.store(place + 6 * B, tl.sum(share6, 0), mask=row_valid)
            if UNROLLED_SLOTS > 7:
                tl.store(place + 7 * B, tl.sum(share7, 0), mask=row_valid)
        else:
            place = shares + (group * M + candidates).to(tl.int64)[:, None] * B + rows[None, :]
            tl.store(place, share, mask=row_valid[None, :] & (candidates < M)[:, None])
    if NEED_TOTALS:
        sums = tl.sum(tl.sum(total, 1), 0)
        if HAS_MARGIN:  # noqa: SIM102
            if (group == 0) & (first == 0):
                sums += tl.sum(of_target * by_tau, 0) * tl.load(tau).to(ACC)
        tl.store(totals + split * groups + group, sums)
    tl.store(flags + split * groups + group, flag)
