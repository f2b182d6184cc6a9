"""From the tiles' parts to the loss: one launch over rows, one that adds them up.

With O the log-sum-exp of all classes but the target, and s the target's score, margin and bias included, a row's loss is
log(1 + exp(O - s)), exact however small it is. The backward needs O and O - s of each row, and nothing of [B, K].
"""

from __future__ import annotations

import triton
import triton.language as tl

from .lse_partials import zero_if_minus_infinity

#: Numbers of a row that the backward needs; the last three only with a margin.
SHIFT = tl.constexpr(0)  # O; inf where there is no other class, so that exp(z - O) is 0
EXCESS = tl.constexpr(1)  # O - s; inf where the row is ignored
BY_LOGIT = tl.constexpr(2)  # ∂(apply_margin logit) / ∂(logit)
BY_TAU = tl.constexpr(3)
BY_MARGIN = tl.constexpr(4)
#: Kinds of a margin; 0 is none.
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
    """The target's logits with their margins, and their derivatives by logit, τ and margin."""
    one = tl.full(logit.shape, 1.0, logit.dtype)
    if MARGIN == LOGIT:
        return logit - margin, one, tl.zeros_like(logit), -one
    elif MARGIN == COSINE:
        return logit - tau * margin, one, -margin, -tau * one
    else:
        cosine = logit / tau
        square = 1.0 - cosine * cosine
        # The least normal number of float32, or of float64.
        least = 2.2250738585072014e-308 if logit.dtype == tl.float64 else 1.17549435e-38
        tiny = tl.full(logit.shape, least, logit.dtype)
        sine = _root(tl.where(square < tiny, tiny, square))
        cosine_m = tl.cos(margin)
        sine_m = tl.sin(margin)
        beyond = cosine < -cosine_m  # θ + margin > π
        value = tl.where(beyond, cosine - margin * sine_m, cosine * cosine_m - sine * sine_m)
        by_sine = tl.where(square < tiny, tl.zeros_like(sine), sine_m * cosine / sine)
        by_cosine = tl.where(beyond, one, cosine_m + by_sine)
        by_margin = tl.where(beyond, -sine_m - margin * cosine_m, -cosine * sine_m - sine * cosine_m)
        return tau * value, by_cosine, value - cosine * by_cosine, tau * by_margin


@triton.jit
def softplus(x):
    """log(1 + e^x), with the digits of e^x where that is small."""
    y = tl.exp(-tl.abs(x))
    one_more = 1.0 + y
    tail = tl.where(one_more == 1.0, y, tl.log(one_more) * (y / (one_more - 1.0)))
    return tl.where(x > 0, x, tl.zeros_like(x)) + tl.where(x == x, tail, x)


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
    parts,  # [3, programs]: losses, what a mean divides by, and targets out of range
    scalars,  # [2]: here the second, Σ weight over the classes
    B,
    K,
    tiles,
    ignore_index,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    MARGIN: tl.constexpr,
    MARGIN_EACH: tl.constexpr,  # a margin for each class
    SMOOTHING: tl.constexpr,
    REDUCED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """A program: BLOCK_R rows."""
    ACC: tl.constexpr = lse.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_valid = rows < B
    lanes = tl.arange(0, BLOCK_T)
    plane = tl.cast(tiles, tl.int64) * B
    low = tl.full((BLOCK_T, BLOCK_R), float("-inf"), ACC)
    largest = low
    total = tl.zeros((BLOCK_T, BLOCK_R), ACC)
    weighted = tl.zeros((BLOCK_T, BLOCK_R), ACC)
    weights = tl.zeros((BLOCK_T,), ACC)
    biases = tl.zeros((BLOCK_T,), ACC)
    for start in range(0, tiles, BLOCK_T):
        tile = start + lanes
        inside = (tile < tiles)[:, None] & row_valid[None, :]
        place = partials + tile.to(tl.int64)[:, None] * B + rows[None, :]
        more = tl.load(place, mask=inside, other=float("-inf"))
        joint = tl.maximum(largest, more)
        shift = zero_if_minus_infinity(joint)
        more_total = tl.load(place + plane, mask=inside, other=0.0)
        total = total * tl.exp(largest - shift) + more_total * tl.exp(more - shift)
        largest = joint
        if SMOOTHING > 0:
            weighted += tl.load(place + 2 * plane, mask=inside, other=0.0)
            weights += tl.load(class_sums + tile, mask=tile < tiles, other=0.0)
            if HAS_BIAS:
                biases += tl.load(class_sums + tiles + tile, mask=tile < tiles, other=0.0)
    top = tl.max(largest, 0)
    total_row = tl.sum(total * tl.exp(largest - zero_if_minus_infinity(top)[None, :]), 0)
    others = top + tl.log(total_row)

    y = tl.load(target + rows, mask=row_valid, other=0).to(tl.int64)
    ignored = (y == ignore_index) | (rows >= B)
    astray = (ignored == 0) & ((y < 0) | (y >= K))
    counted = (ignored == 0) & (astray == 0)
    own = tl.where(counted, y, tl.zeros_like(y))
    logit = tl.load(target_logits + rows, mask=counted, other=0.0)
    place = saved + rows
    target_logit = logit
    if MARGIN > 0:
        each = tl.load(margin + (own if MARGIN_EACH else tl.zeros_like(own))).to(ACC)
        scale = tl.load(tau).to(ACC)
        target_logit, by_logit, by_tau, by_margin = apply_margin(logit, scale, each, MARGIN)
        stride = tl.cast(B, tl.int64)
        tl.store(place + BY_LOGIT * stride, by_logit, mask=row_valid)
        tl.store(place + BY_TAU * stride, by_tau, mask=row_valid)
        tl.store(place + BY_MARGIN * stride, by_margin, mask=row_valid)
    score = target_logit
    if HAS_BIAS:
        score = score + tl.load(class_bias + own).to(ACC)
    excess = others - score
    value = softplus(excess)
    full = tl.where(ignored, others, score + value)
    weight = tl.full((BLOCK_R,), 1.0, ACC)
    if HAS_WEIGHT:
        weight = tl.load(class_weight + own).to(ACC)
        value = weight * value
    if SMOOTHING > 0:
        every = tl.sum(weights, 0)
        summed = tl.sum(weighted, 0) + weight * (target_logit - logit)
        if HAS_BIAS:
            summed += tl.sum(biases, 0)
        value = (1 - SMOOTHING) * value + SMOOTHING / tl.cast(K, ACC) * (full * every - summed)
    if tl.program_id(0) == 0:
        tl.store(scalars + 1, tl.sum(weights, 0))
    value = tl.where(ignored, tl.zeros_like(value), value)
    infinite = tl.full((BLOCK_R,), float("inf"), ACC)
    tl.store(place, tl.where(others == float("-inf"), infinite, others), mask=row_valid)
    tl.store(place + B, tl.where(ignored, infinite, excess), mask=row_valid)
    tl.store(lse + rows, full, mask=row_valid)
    if not REDUCED:
        tl.store(loss + rows, value, mask=row_valid)
    programs = tl.num_programs(0)
    tl.store(parts + tl.program_id(0), tl.sum(value, 0))
    tl.store(parts + programs + tl.program_id(0), tl.sum(tl.where(ignored, tl.zeros_like(weight), weight), 0))
    tl.store(parts + 2 * programs + tl.program_id(0), tl.sum(tl.where(astray, 1.0, 0.0).to(ACC), 0))


@triton.jit
def reduce_loss_kernel(
    parts,  # [3, programs]
    loss,  # one element: written if there is a reduction
    scalars,  # [2]: here the first, what a mean divides by
    inside,  # one element: whether all targets are in range
    programs,
    BLOCK: tl.constexpr,
    REDUCED: tl.constexpr,
    MEAN: tl.constexpr,
):
    """One program, so that the order of the sums is fixed."""
    ACC: tl.constexpr = parts.dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    losses = tl.zeros((BLOCK,), ACC)
    counts = tl.zeros((BLOCK,), ACC)
    strays = tl.zeros((BLOCK,), ACC)
    for start in range(0, programs, BLOCK):
        place = start + lanes
        valid = place < programs
        losses += tl.load(parts + place, mask=valid, other=0.0)
        counts += tl.load(parts + programs + place, mask=valid, other=0.0)
        strays += tl.load(parts + 2 * programs + place, mask=valid, other=0.0)
    count = tl.sum(counts, 0)
    tl.store(scalars, count)
    tl.store(inside, tl.sum(strays, 0) == 0)
    if REDUCED:
        value = tl.sum(losses, 0)
        if MEAN:
            value = value / count
        tl.store(loss, value)
