"""The gradient of the scores, from scores, what the forward kept of each row, and the gradients of loss and lse."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import BY_LOGIT, BY_MARGIN, BY_TAU, EXCESS, SHIFT


@triton.jit
def row_factors(
    rows,
    row_valid,
    grad_loss,  # one element, or [B] by a stride; unused if there is none
    grad_stride,
    grad_lse,  # [B] by a stride; unused if there is none
    lse_stride,
    saved,  # of rows_kernel
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
    """Derivatives of the lowered logit by logit, τ and margin."""
    stride = tl.cast(B, tl.int64)
    by_logit = tl.load(saved + BY_LOGIT * stride + rows, mask=row_valid, other=0.0)
    by_tau = tl.load(saved + BY_TAU * stride + rows, mask=row_valid, other=0.0)
    by_margin = tl.load(saved + BY_MARGIN * stride + rows, mask=row_valid, other=0.0)
    return by_logit, by_tau, by_margin
