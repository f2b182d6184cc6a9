"""The backward's one pass over the gradient: routed weights, and their sums over classes and over features.

    H'[i, k] = τ G |R[k, j*]| / |f_i|     S'[i, j] = Σ_{k: j* = j} H'     U[j, k] = Σ_{i: j* = j} G logits

with j* the slot that won. T = R² U of the correction, and ∂τ = Σ U / τ, are made of U later. For a loss (SOFTMAX) G is
made here as well, from the scores, and never written but for pairs that cancel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numbers import is_clamped
from .partials import row_targets
from .softmax import margin_factors, row_factors


@triton.jit
def route_kernel(
    grad,  # G [B, K]; with SOFTMAX written, where pairs cancel
    logits,  # [B, K]
    slots,  # [B, K]
    center_rnorms,  # [M, K]
    input_rnorms,  # [B]
    tau,  # one element
    weights,  # H' [B, stride], or unused
    shares,  # [groups, M, B]: parts of S', or unused
    moments,  # [splits, M, K]: parts of U, or unused
    totals,  # [splits, groups]: parts of Σ U, or unused
    flags,  # [splits, groups]: whether pairs that cancel have won there
    grad_loss,  # this and what follows only with SOFTMAX: `row_factors` says what it is
    grad_lse,
    saved,
    scalars,
    target,
    class_bias,
    class_weight,
    bias_parts,  # [splits, K]: parts of the gradient of the bias, or unused
    margin_parts,  # [splits, K]: likewise of the margin
    B,
    K,
    stride,  # of H', a multiple of 16 for the sake of wide loads
    M,
    tiles,  # class tiles a group
    grad_stride,
    lse_stride,
    first,  # class of the chunk
    every_class,
    ignore_index,
    TILE_B: tl.constexpr,
    TILE_K: tl.constexpr,
    SLOTS: tl.constexpr,  # M, rounded up to a power of two
    NEED_WEIGHTS: tl.constexpr,
    NEED_SHARES: tl.constexpr,
    NEED_MOMENTS: tl.constexpr,
    NEED_TOTALS: tl.constexpr,
    LARGEST: tl.constexpr,  # of the dtype of H', where that is float16; otherwise 0
    SOFTMAX: tl.constexpr,
    SMOOTHING: tl.constexpr,
    MEAN: tl.constexpr,
    HAS_LOSS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_MARGIN: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    NEED_MARGIN: tl.constexpr,
):
    """A program: TILE_B features and a group of class tiles. Tiles of features follow each other, for the norms."""
    splits = tl.cdiv(B, TILE_B)
    split = tl.program_id(0) % splits
    group = tl.program_id(0) // splits
    groups = tl.num_programs(0) // splits
    rows = split * TILE_B + tl.arange(0, TILE_B)
    candidates = tl.arange(0, SLOTS)
    row_valid = rows < B
    input_rnorm = tl.load(input_rnorms + rows, mask=row_valid, other=0.0)
    scale = tl.load(tau).to(input_rnorm.dtype) * input_rnorm
    share = tl.zeros((TILE_B, SLOTS), input_rnorm.dtype)
    total = tl.zeros((TILE_B,), input_rnorm.dtype)
    flag = tl.zeros((TILE_B,), tl.int32)
    if SOFTMAX:
        places = row_targets(target, rows, row_valid, first, ignore_index)
        factor, of_sums, of_target, shift = row_factors(
            rows, row_valid, grad_loss, grad_stride, grad_lse, lse_stride, saved, scalars, target, class_weight,
            B, every_class, ignore_index, SMOOTHING, MEAN, HAS_LOSS, HAS_LSE, HAS_WEIGHT,
        )  # fmt: skip
        of_logit = of_target
        if HAS_MARGIN:
            by_logit, by_tau, by_margin = margin_factors(rows, row_valid, saved, B)
            of_logit = of_target * by_logit
            if NEED_TOTALS:
                if group == 0:
                    if first == 0:  # beside Σ U: all is divided by τ later
                        total += of_target * by_tau * tl.load(tau).to(total.dtype)

    for tile in range(group * tiles, group * tiles + tiles):
        classes = tile * TILE_K + tl.arange(0, TILE_K)
        valid = row_valid[:, None] & (classes < K)[None, :]
        offsets = rows.to(tl.int64)[:, None] * K + classes[None, :]
        if SOFTMAX:
            z = tl.load(logits + offsets, mask=valid, other=0.0)
            score = z
            if HAS_BIAS:
                bias = tl.load(class_bias + (first + classes), mask=classes < K, other=0.0)
                score = score + bias.to(z.dtype)[None, :]
            g = factor[:, None] * tl.exp(score - shift[:, None])
            if SMOOTHING > 0:
                spread = of_sums[:, None]
                if HAS_WEIGHT:
                    weight = tl.load(class_weight + (first + classes), mask=classes < K, other=0.0)
                    spread = spread * weight.to(z.dtype)[None, :]
                g += spread
            own = classes[None, :] == places[:, None]
            if NEED_BIAS:
                of_bias = tl.where(own, of_target[:, None], g)
                of_bias = tl.sum(tl.where(valid, of_bias, tl.zeros_like(g)), 0)
                tl.store(bias_parts + tl.cast(split, tl.int64) * K + classes, of_bias, mask=classes < K)
            if NEED_MARGIN:
                of_margin = tl.where(own & valid, (of_target * by_margin)[:, None], tl.zeros_like(g))
                place = margin_parts + tl.cast(split, tl.int64) * K + classes
                tl.store(place, tl.sum(of_margin, 0), mask=classes < K)
            g = tl.where(valid, tl.where(own, of_logit[:, None], g), tl.zeros_like(g))
        else:
            g = tl.load(grad + offsets, mask=valid, other=0.0)
        slot = tl.load(slots + offsets, mask=valid, other=0).to(tl.int32)
        slot = tl.minimum(slot, M - 1)  # an operator called by hand must not read elsewhere
        rnorm = tl.load(center_rnorms + slot.to(tl.int64) * K + classes[None, :], mask=valid, other=0.0)
        apart = valid & (rnorm < 0)
        flag = flag | tl.max(apart.to(tl.int32), 1)
        if SOFTMAX:
            if M > 1:
                tl.store(grad + offsets, g, mask=apart)
        h = tl.where(apart, tl.zeros_like(g), scale[:, None] * g * tl.abs(rnorm))
        h = tl.where(valid, h, tl.zeros_like(h))
        if LARGEST > 0:
            # Weights of zero vectors are of the order of 1e12. As infinities they would give NaN where they meet
            # their zero vector, and so in the gradients of all others.
            bounded = tl.minimum(tl.maximum(h, -LARGEST), LARGEST)
            extreme = (is_clamped(rnorm) | is_clamped(input_rnorm)[:, None]) & (h == h)
            h = tl.where(extreme, bounded, h)
        rounded = h
        if NEED_WEIGHTS:
            stored = h.to(weights.dtype.element_ty)
            inside = row_valid[:, None] & (classes < stride)[None, :]
            tl.store(weights + rows.to(tl.int64)[:, None] * stride + classes[None, :], stored, mask=inside)
            rounded = stored.to(h.dtype)  # S' sums what the products will see, so that roundings cancel alike
        if NEED_MOMENTS or NEED_TOTALS:
            if SOFTMAX:
                u = g * z
            else:
                u = g * tl.load(logits + offsets, mask=valid, other=0.0)
        if NEED_TOTALS:
            total += tl.sum(u, 1)
        if NEED_SHARES or NEED_MOMENTS:
            for j in range(M):
                won = slot == j
                if NEED_SHARES:
                    part = tl.sum(tl.where(won, rounded, tl.zeros_like(rounded)), 1)
                    share += tl.where(candidates[None, :] == j, part[:, None], tl.zeros_like(share))
                if NEED_MOMENTS:
                    moment = tl.sum(tl.where(won, u, tl.zeros_like(u)), 0)
                    row = (split * M + j).to(tl.int64) * K
                    tl.store(moments + row + classes, moment, mask=classes < K)

    if NEED_SHARES:
        place = shares + (group * M + candidates).to(tl.int64)[None, :] * B + rows[:, None]
        tl.store(place, share, mask=row_valid[:, None] & (candidates < M)[None, :])
    if NEED_TOTALS:
        tl.store(totals + split * groups + group, tl.sum(total, 0))
    tl.store(flags + split * groups + group, tl.max(flag, 0))
