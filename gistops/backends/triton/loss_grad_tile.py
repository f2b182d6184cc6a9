"""The gradient of a loss by the logits of a tile, and its routed weights: the parts of route_loss_grad_kernel.

The gradient is a function of the logits, of what the forward saved of each row, and of the gradients of loss and lse.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
def loss_grad_tile(
    z,  # logits [classes, rows]
    slot,
    classes,
    class_valid,
    row_valid,
    targets,  # from local_targets
    scale,  # τ / |f_i|
    input_rnorm,
    factor,  # from row_factors, as d_sums, d_target and lse_others
    d_sums,
    d_target,
    d_logit,  # the gradient of the target's logit: d_target, times the derivative of the margin
    d_margin,  # the gradient of the target's margin, or unused
    lse_others,
    center_rnorms,
    class_bias,
    class_weight,
    first_class,
    K,
    M,
    UNROLLED_SLOTS: tl.constexpr,
    MAX_WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    NEED_MARGIN: tl.constexpr,
    INTERLEAVED: tl.constexpr,  # center_rnorms is [K, M]
):
    """Return G, H', true for pairs that cancel, whose H' is 0, and the sums over rows for bias and margin."""
    valid = class_valid[:, None] & row_valid[None, :]
    # Selection, because an indexed load would change the tile's layout.
    rnorm = tl.zeros_like(z)
    elements = classes
    slot_stride = K
    if INTERLEAVED:
        elements = classes * M
        slot_stride = 1
    if UNROLLED_SLOTS > 0:
        for j in tl.static_range(UNROLLED_SLOTS):
            rnorm = select_rnorm(rnorm, slot, j, center_rnorms, elements, class_valid, slot_stride, 1)
    else:
        for j in range(M):
            rnorm = select_rnorm(rnorm, slot, j, center_rnorms, elements, class_valid, slot_stride, 1)
    score = z
    if HAS_BIAS:
        bias = tl.load(class_bias + (first_class + classes), mask=class_valid, other=0.0)
        score = score + bias.to(z.dtype)[:, None]
    g = factor[None, :] * tl.exp(score - lse_others[None, :])
    if SMOOTHING > 0:
        smoothing_term = tl.zeros_like(g) + d_sums[None, :]
        if HAS_WEIGHT:
            weight = tl.load(class_weight + (first_class + classes), mask=class_valid, other=0.0)
            smoothing_term = smoothing_term * weight.to(z.dtype)[:, None]
        g += smoothing_term
    is_target = valid & (classes[:, None] == targets[None, :])
    zeros = tl.zeros_like(g)
    d_bias = tl.zeros((z.shape[0],), z.dtype)
    d_class_margin = tl.zeros((z.shape[0],), z.dtype)
    if NEED_BIAS:
        d_bias = tl.sum(tl.where(valid, tl.where(is_target, d_target[None, :], g), zeros), 1)
    if NEED_MARGIN:
        d_class_margin = tl.sum(tl.where(is_target, d_margin[None, :], zeros), 1)
    g = tl.where(valid, tl.where(is_target, d_logit[None, :], g), zeros)
    cancels = valid & (rnorm < 0)
    h = tl.where(cancels, zeros, scale[None, :] * g * tl.abs(rnorm))
    if MAX_WEIGHT > 0:
        h = bound_weights(h, rnorm, input_rnorm, 0, MAX_WEIGHT)
    return g, tl.where(valid, h, zeros), cancels, d_bias, d_class_margin


@triton.jit
def store_moments(moments, j, slot, u, split, classes, class_valid, K, M, INTERLEAVED: tl.constexpr):
    """Store the tile's U of slot j: [splits, M, K], or [splits, K, M] with INTERLEAVED."""
    moment = tl.sum(tl.where(slot == j, u, tl.zeros_like(u)), 1)
    if INTERLEAVED:
        store_by_class(moments + j, moment, split * M, classes * M, class_valid, K)
    else:
        store_by_class(moments, moment, split * M + j, classes, class_valid, K)


@triton.jit
def store_by_class(partials, sums, index, classes, class_valid, K):
    """Store sums of classes into row `index` of partials [n, K]."""
    tl.store(partials + tl.cast(index, tl.int64) * K + classes, sums, mask=class_valid)
