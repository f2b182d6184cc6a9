"""The backward's one pass over the gradient of the logits: it routes the gradient to the winning slots.

    H'[i, k] = τ G |R[k, j*]| / |f_i|     S'[i, j] = Σ_{k: j* = j} H'     U[j, k] = Σ_{i: j* = j} G logits

j* is the winning slot of the pair (i, k). The norm correction T = R² U and ∂τ = Σ U / τ are computed from U later.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import is_clamped, load_tau


@triton.jit
def select_rnorm(rnorm, slot, j, center_rnorms, classes, class_valid, K, AXIS: tl.constexpr):
    """Return rnorm with the inverse norms of slot j where that slot has won. AXIS: the axis of rows."""
    slot_rnorm = tl.load(center_rnorms + tl.cast(j, tl.int64) * K + classes, mask=class_valid, other=0.0)
    return tl.where(slot == j, tl.expand_dims(slot_rnorm, AXIS), rnorm)


@triton.jit
def bound_weights(weights, rnorm, input_rnorm, AXIS: tl.constexpr, MAX_WEIGHT: tl.constexpr):
    """Return H' with the weights of zero vectors limited to ±MAX_WEIGHT. AXIS: the axis of classes.

    Such weights are about 1e12, an infinity in float16. Multiplied by their zero vector it would give NaN, in the
    gradients of all other vectors as well.
    """
    bounded = tl.minimum(tl.maximum(weights, -MAX_WEIGHT), MAX_WEIGHT)
    clamped = is_clamped(rnorm) | tl.expand_dims(is_clamped(input_rnorm), AXIS)
    return tl.where(clamped & (weights == weights), bounded, weights)


@triton.jit
def route_logits_grad_kernel(
    grad,  # G [B, K]
    logits,  # [B, K], as grad in the dtype of the norms or in a narrower one
    slots,  # [B, K]
    center_rnorms,  # [M, K]
    input_rnorms,  # [B]
    tau,  # one element
    weights,  # H' [K, stride], class-major, or unused
    slot_weights,  # [groups, M, B]: partials of S', or unused
    moments,  # [splits, M, K]: partials of U, or unused
    tau_partials,  # [splits, groups]: partials of Σ U, or unused
    flags,  # [splits, groups]: 1 if a pair that cancels has won there
    B,
    K,
    stride,  # row stride of H': B rounded up to a multiple of 16, for wide loads
    M,
    group_tiles,  # class tiles per group
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,  # M rounded up to a power of two
    UNROLLED_SLOTS: tl.constexpr,  # M if it is small; otherwise 0
    NEED_WEIGHTS: tl.constexpr,
    NEED_SLOT_WEIGHTS: tl.constexpr,
    NEED_MOMENTS: tl.constexpr,
    NEED_TAU: tl.constexpr,
    MAX_WEIGHT: tl.constexpr,  # the largest float16 if H' is float16; otherwise 0
):
    """Compute H', and partials of its sums, of BLOCK_B rows (a split) and a group of class tiles.

    Grid: class groups x splits. Consecutive programs share a class group, so that its norms stay in L2.
    """
    splits = tl.cdiv(B, BLOCK_B)
    split = tl.program_id(0) % splits
    group = tl.program_id(0) // splits
    groups = tl.num_programs(0) // splits
    rows = split * BLOCK_B + tl.arange(0, BLOCK_B)
    slot_ids = tl.arange(0, BLOCK_S)
    row_valid = rows < B
    input_rnorm = tl.load(input_rnorms + rows, mask=row_valid, other=0.0)
    scale = load_tau(tau, input_rnorm.dtype) * input_rnorm
    slot_weight = tl.zeros((BLOCK_B, BLOCK_S), input_rnorm.dtype)
    total = tl.zeros((BLOCK_B,), input_rnorm.dtype)
    flag = tl.zeros((BLOCK_B,), tl.int32)

    for tile in range(group * group_tiles, group * group_tiles + group_tiles):
        classes = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        valid = row_valid[:, None] & (classes < K)[None, :]
        # Offsets within the tile have 32 bits: one 64-bit address per element would cost registers.
        begin = tl.cast(split * BLOCK_B, tl.int64) * K + tile * BLOCK_C
        offsets = tl.arange(0, BLOCK_B)[:, None] * K + tl.arange(0, BLOCK_C)[None, :]
        g = tl.load(grad + begin + offsets, mask=valid, other=0.0).to(scale.dtype)
        slot = tl.load(slots + begin + offsets, mask=valid, other=0).to(tl.int32)
        slot = tl.minimum(slot, M - 1)  # slots from a caller must not lead to a read out of bounds
        if UNROLLED_SLOTS > 0:  # selection is cheaper than an indexed load
            rnorm = tl.zeros_like(g)
            for j in tl.static_range(UNROLLED_SLOTS):
                rnorm = select_rnorm(rnorm, slot, j, center_rnorms, classes, classes < K, K, 0)
        else:
            rnorm = tl.load(center_rnorms + slot.to(tl.int64) * K + classes[None, :], mask=valid, other=0.0)
        cancels = valid & (rnorm < 0)
        flag = flag | tl.max(cancels.to(tl.int32), 1)
        h = tl.where(cancels, tl.zeros_like(g), scale[:, None] * g * tl.abs(rnorm))
        h = tl.where(valid, h, tl.zeros_like(h))
        if MAX_WEIGHT > 0:
            h = bound_weights(h, rnorm, input_rnorm, 1, MAX_WEIGHT)
        if NEED_WEIGHTS:
            inside = (rows < stride)[:, None] & (classes < K)[None, :]
            tile_weights = weights + tl.cast(tile * BLOCK_C, tl.int64) * stride + split * BLOCK_B
            transposed = tl.arange(0, BLOCK_C)[None, :] * stride + tl.arange(0, BLOCK_B)[:, None]
            tl.store(tile_weights + transposed, h.to(weights.dtype.element_ty), mask=inside)
        if NEED_MOMENTS or NEED_TAU:
            u = g * tl.load(logits + begin + offsets, mask=valid, other=0.0).to(scale.dtype)
        if NEED_TAU:
            total += tl.sum(u, 1)
        if NEED_SLOT_WEIGHTS or NEED_MOMENTS:
            for j in range(M):
                won = slot == j
                if NEED_SLOT_WEIGHTS:
                    tile_sum = tl.sum(tl.where(won, h, tl.zeros_like(h)), 1)
                    slot_weight += tl.where(
                        slot_ids[None, :] == j, tile_sum[:, None], tl.zeros_like(slot_weight)
                    )
                if NEED_MOMENTS:
                    moment = tl.sum(tl.where(won, u, tl.zeros_like(u)), 0)
                    first = (split * M + j).to(tl.int64) * K
                    tl.store(moments + first + classes, moment, mask=classes < K)

    if NEED_SLOT_WEIGHTS:
        ptrs = slot_weights + (group * M + slot_ids).to(tl.int64)[None, :] * B + rows[:, None]
        tl.store(ptrs, slot_weight, mask=row_valid[:, None] & (slot_ids < M)[None, :])
    if NEED_TAU:
        tl.store(tau_partials + split * groups + group, tl.sum(total, 0))
    tl.store(flags + split * groups + group, tl.max(flag, 0))
