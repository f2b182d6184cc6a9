"""The loss from partial log-sum-exps: one launch over the rows, and one that sums over them.

Let O be the log-sum-exp of a row's non-target logits, and s its target logit, bias and margin included. The row's loss
is log(1 + exp(O - s)), which is accurate however small it is. The backward needs O and O - s of each row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .lse_partials import finite_shift
from .numerics import load_tau

#: Planes of `saved` [n, B], which the backward reads; the last three exist with a margin only.
LSE_OTHERS = tl.constexpr(0)  # O; inf if there is no other class, so that exp(z - O) is 0
EXCESS = tl.constexpr(1)  # O - s; inf if the row is ignored
BY_LOGIT = tl.constexpr(2)  # derivatives of the target logit with margin: by the logit without margin,
BY_TAU = tl.constexpr(3)  # by τ,
BY_MARGIN = tl.constexpr(4)  # and by the margin
#: Kinds of margin; 0 means none.
LOGIT = tl.constexpr(1)
COSINE = tl.constexpr(2)
ANGLE = tl.constexpr(3)


@triton.jit
def _root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def apply_margin(logit, tau, margin, MARGIN: tl.constexpr):
    """Return the target logits with their margins, and the derivatives by logit, τ and margin."""
    one = tl.full(logit.shape, 1.0, logit.dtype)
    if MARGIN == LOGIT:
        return logit - margin, one, tl.zeros_like(logit), -one
    elif MARGIN == COSINE:
        return logit - tau * margin, one, -margin, -tau * one
    else:
        cosine = logit / tau
        square = 1.0 - cosine * cosine
        smallest_normal = 2.2250738585072014e-308 if logit.dtype == tl.float64 else 1.17549435e-38
        tiny = tl.full(logit.shape, smallest_normal, logit.dtype)
        sine = _root(tl.where(square < tiny, tiny, square))
        cosine_m = tl.cos(margin)
        sine_m = tl.sin(margin)
        beyond = (margin > 3.141592653589793) | ((margin >= 0) & (cosine < -cosine_m))  # θ + margin exceeds π
        value = tl.where(beyond, cosine - margin * sine_m, cosine * cosine_m - sine * sine_m)
        by_sine = tl.where(square < tiny, tl.zeros_like(sine), sine_m * cosine / sine)
        by_cosine = tl.where(beyond, one, cosine_m + by_sine)
        by_margin = tl.where(beyond, -sine_m - margin * cosine_m, -cosine * sine_m - sine * cosine_m)
        return tau * value, by_cosine, value - cosine * by_cosine, tau * by_margin


@triton.jit
def softplus(x):
    """Return log(1 + e^x), with a small relative error where e^x is small too."""
    y = tl.exp(-tl.abs(x))
    one_plus_y = 1.0 + y
    tail = tl.where(one_plus_y == 1.0, y, tl.log(one_plus_y) * (y / (one_plus_y - 1.0)))
    return tl.where(x > 0, x, tl.zeros_like(x)) + tl.where(x == x, tail, x)


@triton.jit
def logaddexp(a, b):
    """Return log(e^a + e^b). A NaN stays NaN, and minus infinity adds nothing."""
    largest = tl.where(a > b, a, b)
    return tl.where((a == b) & (a == float("-inf")), a, largest + softplus(-tl.abs(a - b)))


@triton.jit
def row_loss_kernel(
    partials,  # [3, groups, B]
    class_sums,  # [2, groups]
    target_logits,  # [B]
    target,  # [B]
    class_bias,  # [K], or unused
    class_weight,  # [K], or unused
    margin,  # [K], one element, or unused
    tau,  # one element
    loss,  # [B]: written if there is no reduction
    lse,  # [B]
    saved,  # [2, B], or [5, B] with a margin
    loss_partials,  # [3, programs]: sums of losses, of weights, and of targets out of range
    scalars,  # [2]: the second is written, Σ weight over the classes
    B,
    K,
    groups,
    ignore_index,
    BLOCK_B: tl.constexpr,
    BLOCK_G: tl.constexpr,  # groups loaded at a time
    MARGIN: tl.constexpr,
    MARGIN_EACH: tl.constexpr,  # one margin per class
    SMOOTHING: tl.constexpr,
    REDUCED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """Compute the losses of BLOCK_B rows, and what the backward needs of them. Grid: row tiles."""
    ACC: tl.constexpr = lse.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    row_valid = rows < B
    lanes = tl.arange(0, BLOCK_G)
    plane = tl.cast(groups, tl.int64) * B
    largest = tl.full((BLOCK_G, BLOCK_B), float("-inf"), ACC)
    total = tl.zeros((BLOCK_G, BLOCK_B), ACC)
    weighted = tl.zeros((BLOCK_G, BLOCK_B), ACC)
    weights = tl.zeros((BLOCK_G,), ACC)
    biases = tl.zeros((BLOCK_G,), ACC)
    for start in range(0, groups, BLOCK_G):
        group = start + lanes
        inside = (group < groups)[:, None] & row_valid[None, :]
        ptrs = partials + group.to(tl.int64)[:, None] * B + rows[None, :]
        more = tl.load(ptrs, mask=inside, other=float("-inf"))
        joint = tl.maximum(largest, more)
        shift = finite_shift(joint)
        more_total = tl.load(ptrs + plane, mask=inside, other=0.0)
        total = total * tl.exp(largest - shift) + more_total * tl.exp(more - shift)
        largest = joint
        if SMOOTHING > 0:
            weighted += tl.load(ptrs + 2 * plane, mask=inside, other=0.0)
            weights += tl.load(class_sums + group, mask=group < groups, other=0.0)
            if HAS_BIAS:
                biases += tl.load(class_sums + groups + group, mask=group < groups, other=0.0)
    row_largest = tl.max(largest, 0)
    row_total = tl.sum(total * tl.exp(largest - finite_shift(row_largest)[None, :]), 0)
    lse_others = row_largest + tl.log(row_total)

    y = tl.load(target + rows, mask=row_valid, other=0).to(tl.int64)
    ignored = (y == ignore_index) | (rows >= B)
    out_of_range = (ignored == 0) & ((y < 0) | (y >= K))
    counted = (ignored == 0) & (out_of_range == 0)
    y = tl.where(counted, y, tl.zeros_like(y))
    logit = tl.load(target_logits + rows, mask=counted, other=0.0)
    saved_ptrs = saved + rows
    target_logit = logit
    if MARGIN > 0:
        row_margin = tl.load(margin + (y if MARGIN_EACH else tl.zeros_like(y))).to(ACC)
        scale = load_tau(tau, ACC)
        target_logit, by_logit, by_tau, by_margin = apply_margin(logit, scale, row_margin, MARGIN)
        stride = tl.cast(B, tl.int64)
        tl.store(saved_ptrs + BY_LOGIT * stride, by_logit, mask=row_valid)
        tl.store(saved_ptrs + BY_TAU * stride, by_tau, mask=row_valid)
        tl.store(saved_ptrs + BY_MARGIN * stride, by_margin, mask=row_valid)
    score = target_logit
    if HAS_BIAS:
        bias = tl.load(class_bias + y).to(ACC)
        score = score + bias
    score = tl.where(
        score == float("inf"), tl.full(score.shape, float("nan"), ACC), score
    )  # as in F.cross_entropy
    excess = lse_others - score
    value = softplus(excess)
    lse_all = tl.where(ignored, lse_others, logaddexp(lse_others, score))
    weight = tl.full((BLOCK_B,), 1.0, ACC)
    if HAS_WEIGHT:
        weight = tl.load(class_weight + y).to(ACC)
    if SMOOTHING > 0:
        # The sum of weight (lse - score) over the classes; functional/cross_entropy.py explains its order.
        target_term = value
        weighted_sum = tl.sum(weighted, 0)
        if HAS_BIAS:
            target_term = tl.where(bias == float("-inf"), lse_all - target_logit, value + bias)
            weighted_sum += tl.sum(biases, 0)
        spread = lse_all * (tl.sum(weights, 0) - weight) - weighted_sum + weight * (logit + target_term)
        value = (1 - SMOOTHING) * weight * value + SMOOTHING / tl.cast(K, ACC) * spread
    elif HAS_WEIGHT:
        value = weight * value
    if tl.program_id(0) == 0:
        tl.store(scalars + 1, tl.sum(weights, 0))
    value = tl.where(ignored, tl.zeros_like(value), value)
    infinite = tl.full((BLOCK_B,), float("inf"), ACC)
    tl.store(saved_ptrs, tl.where(lse_others == float("-inf"), infinite, lse_others), mask=row_valid)
    tl.store(saved_ptrs + B, tl.where(ignored, infinite, excess), mask=row_valid)
    tl.store(lse + rows, lse_all, mask=row_valid)
    if not REDUCED:
        tl.store(loss + rows, value, mask=row_valid)
    programs = tl.num_programs(0)
    program = tl.program_id(0)
    tl.store(loss_partials + program, tl.sum(value, 0))
    tl.store(loss_partials + programs + program, tl.sum(tl.where(ignored, tl.zeros_like(weight), weight), 0))
    tl.store(loss_partials + 2 * programs + program, tl.sum(tl.where(out_of_range, 1.0, 0.0).to(ACC), 0))


@triton.jit
def reduce_loss_kernel(
    loss_partials,  # [3, programs]
    loss,  # one element: written if there is a reduction
    scalars,  # [2]: the first is written, the sum of weights, by which a mean divides
    in_range,  # one element: true if all targets are in range
    programs,
    BLOCK: tl.constexpr,
    REDUCED: tl.constexpr,
    MEAN: tl.constexpr,
):
    """Sum the partials of the loss. Grid: one program, so that the order of the sums is fixed."""
    ACC: tl.constexpr = loss_partials.dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    losses = tl.zeros((BLOCK,), ACC)
    weights = tl.zeros((BLOCK,), ACC)
    out_of_range = tl.zeros((BLOCK,), ACC)
    for start in range(0, programs, BLOCK):
        program = start + lanes
        valid = program < programs
        losses += tl.load(loss_partials + program, mask=valid, other=0.0)
        weights += tl.load(loss_partials + programs + program, mask=valid, other=0.0)
        out_of_range += tl.load(loss_partials + 2 * programs + program, mask=valid, other=0.0)
    weight_sum = tl.sum(weights, 0)
    # A mean over no weight is NaN, and so are its gradients, even if label smoothing makes the sum of the losses positive.
    divisor = tl.where(weight_sum == 0, float("nan"), weight_sum)
    tl.store(scalars, divisor)
    tl.store(in_range, tl.sum(out_of_range, 0) == 0)
    if REDUCED:
        value = tl.sum(losses, 0)
        if MEAN:
            value = value / divisor
        tl.store(loss, value)
