"""The loss's backward from vectors to routed weights as one kernel: the product is computed again, and not written.

Its epilogue is that of route_loss_grad_kernel. In class tiles in which a pair cancels, logits and slots come from
rescore_cancelled_lse_kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cancellation import any_cancelled
from .forward import tile_products
from .loss_grad_tile import loss_grad_tile, margin_factors, row_factors, slot_moment, store_by_class
from .lse import score_tile
from .lse_partials import local_targets
from .numerics import load_tau


@triton.jit
def fused_route_loss_grad_kernel(
    input,  # [B, d]
    centers,  # [K, d]
    grad,  # G [K, stride]: written for pairs that cancel; unused if M is 1
    scores,  # z [K, stride], in class tiles in which a pair cancels; may be the memory of grad
    slots,  # [K, stride], in class tiles in which a pair cancels
    center_rnorms,  # [M, K]
    shifts,  # [M, B]
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
    d,
    stride,
    M,
    grad_stride,
    lse_stride,
    first_class,  # the first class of the chunk
    num_classes,  # number of classes of all chunks
    ignore_index,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLLED_SLOTS: tl.constexpr,  # M
    MAX_WEIGHT: tl.constexpr,  # the largest float16 if H' is float16; otherwise 0
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
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
    """Compute H', and partials of its sums, of one class tile, which is a group here, and BLOCK_B rows, a split.

    Grid: class tiles x row tiles, as fused_lse_kernel.
    """
    row_tiles = tl.cdiv(B, BLOCK_B)
    row_tile = tl.program_id(0) % row_tiles
    group = tl.program_id(0) // row_tiles
    groups = tl.num_programs(0) // row_tiles
    classes = group * BLOCK_C + tl.arange(0, BLOCK_C)
    class_valid = classes < K
    rows = row_tile * BLOCK_B + tl.arange(0, BLOCK_B)
    row_valid = rows < B
    products = tile_products(
        input, centers, classes, class_valid, rows, row_valid, d,
        BLOCK_C, BLOCK_B, BLOCK_D, ACC, PRECISION, WIDEN,
    )  # fmt: skip
    group_cancels = any_cancelled(center_rnorms, group * BLOCK_C, BLOCK_C, K, M)
    start = tl.cast(group, tl.int64) * BLOCK_C * stride
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
    offsets = tl.arange(0, BLOCK_C)[:, None] * stride + rows[None, :]
    inside = class_valid[:, None] & (rows < stride)[None, :]
    z, slot = score_tile(
        products, classes, class_valid, rows, row_valid, scale, center_rnorms, shifts, B, K, M, UNROLLED_SLOTS
    )  # fmt: skip
    if group_cancels:  # almost never
        valid = class_valid[:, None] & row_valid[None, :]
        z = tl.load(scores + start + offsets, mask=valid, other=0.0)
        slot = tl.load(slots + start + offsets, mask=valid, other=0).to(tl.int32)
    g, h, cancels, d_bias, d_class_margin = loss_grad_tile(
        z, slot, classes, class_valid, row_valid, targets, scale, input_rnorm, factor, d_sums, d_target, d_logit,
        d_margin, lse_others, center_rnorms, class_bias, class_weight,
        first_class, K, M, UNROLLED_SLOTS, MAX_WEIGHT, SMOOTHING, HAS_BIAS, HAS_WEIGHT, NEED_BIAS, NEED_MARGIN,
        False,
    )  # fmt: skip
    flag = tl.cast(0, tl.int32)
    if group_cancels:
        tl.store(grad + start + offsets, g, mask=cancels)
        flag = tl.max(tl.max(cancels.to(tl.int32), 1), 0)
    if NEED_WEIGHTS:
        tl.store(weights + start + offsets, h.to(weights.dtype.element_ty), mask=inside)
    u = g * z
    if NEED_SLOT_WEIGHTS:
        for j in tl.static_range(UNROLLED_SLOTS):
            weight = tl.sum(tl.where(slot == j, h, tl.zeros_like(h)), 0)
            tl.store(slot_weights + (group * M + j).to(tl.int64) * B + rows, weight, mask=row_valid)
    if NEED_MOMENTS:
        for j in tl.static_range(UNROLLED_SLOTS):
            store_by_class(moments, slot_moment(j, slot, u), row_tile * M + j, classes, class_valid, K)
    if NEED_BIAS:
        store_by_class(bias_partials, d_bias, row_tile, classes, class_valid, K)
    if NEED_MARGIN:
        store_by_class(margin_partials, d_class_margin, row_tile, classes, class_valid, K)
    if NEED_TAU:
        total = tl.sum(tl.sum(u, 1), 0)
        if HAS_MARGIN:  # noqa: SIM102
            if (group == 0) & (first_class == 0):
                total += tl.sum(d_target * by_tau, 0) * load_tau(tau, ACC)
        tl.store(tau_partials + row_tile * groups + group, total)
    tl.store(flags + row_tile * groups + group, flag)
