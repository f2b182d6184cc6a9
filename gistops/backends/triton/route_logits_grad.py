"""The backward's one pass over the gradient: routed weights, and their sums over classes and over features.

    H'[i, k] = τ G |R[k, j*]| / |f_i|     S'[i, j] = Σ_{k: j* = j} H'     U[j, k] = Σ_{i: j* = j} G logits

with j* the slot that won. T = R² U of the correction, and ∂τ = Σ U / τ, are made of U later.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import is_clamped


@triton.jit
def route_logits_grad_kernel(
    grad,  # [B, K]
    logits,  # [B, K]
    slots,  # [B, K]
    center_rnorms,  # [M, K]
    input_rnorms,  # [B]
    tau,  # one element
    weights,  # H' [K, stride], class by class, or unused
    shares,  # [groups, M, B]: parts of S', or unused
    moments,  # [splits, M, K]: parts of U, or unused
    totals,  # [splits, groups]: parts of Σ U, or unused
    flags,  # [splits, groups]: whether pairs that cancel have won there
    B,
    K,
    stride,  # of H', B rounded up to a multiple of 16 for the sake of wide loads
    M,
    tiles,  # class tiles a group
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,  # M, rounded up to a power of two
    UNROLLED_SLOTS: tl.constexpr,  # M where that is small; otherwise 0
    NEED_WEIGHTS: tl.constexpr,
    NEED_SHARES: tl.constexpr,
    NEED_MOMENTS: tl.constexpr,
    NEED_TOTALS: tl.constexpr,
    MAX_WEIGHT: tl.constexpr,  # of the dtype of H', where that is float16; otherwise 0
):
    """A program: BLOCK_B features and a group of class tiles. Tiles of features follow each other, for the norms."""
    splits = tl.cdiv(B, BLOCK_B)
    split = tl.program_id(0) % splits
    group = tl.program_id(0) // splits
    groups = tl.num_programs(0) // splits
    rows = split * BLOCK_B + tl.arange(0, BLOCK_B)
    candidates = tl.arange(0, BLOCK_S)
    row_valid = rows < B
    input_rnorm = tl.load(input_rnorms + rows, mask=row_valid, other=0.0)
    scale = tl.load(tau).to(input_rnorm.dtype) * input_rnorm
    share = tl.zeros((BLOCK_B, BLOCK_S), input_rnorm.dtype)
    total = tl.zeros((BLOCK_B,), input_rnorm.dtype)
    flag = tl.zeros((BLOCK_B,), tl.int32)

    for tile in range(group * tiles, group * tiles + tiles):
        classes = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        valid = row_valid[:, None] & (classes < K)[None, :]
        # From the tile's first element on in 32 bits: addresses of 64 take registers, element by element.
        begin = tl.cast(split * BLOCK_B, tl.int64) * K + tile * BLOCK_C
        offsets = tl.arange(0, BLOCK_B)[:, None] * K + tl.arange(0, BLOCK_C)[None, :]
        g = tl.load(grad + begin + offsets, mask=valid, other=0.0)
        slot = tl.load(slots + begin + offsets, mask=valid, other=0).to(tl.int32)
        slot = tl.minimum(slot, M - 1)  # an operator called by hand must not read elsewhere
        if UNROLLED_SLOTS > 0:  # by selection, which takes less than to gather
            rnorm = tl.zeros_like(g)
            for j in tl.static_range(UNROLLED_SLOTS):
                known = tl.load(
                    center_rnorms + tl.cast(j, tl.int64) * K + classes, mask=classes < K, other=0.0
                )
                rnorm = tl.where(slot == j, known[None, :], rnorm)
        else:
            rnorm = tl.load(center_rnorms + slot.to(tl.int64) * K + classes[None, :], mask=valid, other=0.0)
        cancels = valid & (rnorm < 0)
        flag = flag | tl.max(cancels.to(tl.int32), 1)
        h = tl.where(cancels, tl.zeros_like(g), scale[:, None] * g * tl.abs(rnorm))
        h = tl.where(valid, h, tl.zeros_like(h))
        if MAX_WEIGHT > 0:
            # Weights of zero vectors are of the order of 1e12. As infinities they would give NaN where they meet
            # their zero vector, and so in the gradients of all others.
            bounded = tl.minimum(tl.maximum(h, -MAX_WEIGHT), MAX_WEIGHT)
            extreme = (is_clamped(rnorm) | is_clamped(input_rnorm)[:, None]) & (h == h)
            h = tl.where(extreme, bounded, h)
        if NEED_WEIGHTS:
            inside = (rows < stride)[:, None] & (classes < K)[None, :]
            place = weights + tl.cast(tile * BLOCK_C, tl.int64) * stride + split * BLOCK_B
            across = tl.arange(0, BLOCK_C)[None, :] * stride + tl.arange(0, BLOCK_B)[:, None]
            tl.store(place + across, h.to(weights.dtype.element_ty), mask=inside)
        if NEED_MOMENTS or NEED_TOTALS:
            u = g * tl.load(logits + begin + offsets, mask=valid, other=0.0)
        if NEED_TOTALS:
            total += tl.sum(u, 1)
        if NEED_SHARES or NEED_MOMENTS:
            for j in range(M):
                won = slot == j
                if NEED_SHARES:
                    part = tl.sum(tl.where(won, h, tl.zeros_like(h)), 1)
                    share += tl.where(candidates[None, :] == j, part[:, None], tl.zeros_like(share))
                if NEED_MOMENTS:
                    moment = tl.sum(tl.where(won, u, tl.zeros_like(u)), 0)
                    row = (split * M + j).to(tl.int64) * K
                    tl.store(moments + row + classes, moment, mask=classes < K)

    if NEED_SHARES:
        target = shares + (group * M + candidates).to(tl.int64)[None, :] * B + rows[:, None]
        tl.store(target, share, mask=row_valid[:, None] & (candidates < M)[None, :])
    if NEED_TOTALS:
        tl.store(totals + split * groups + group, tl.sum(total, 0))
    tl.store(flags + split * groups + group, tl.max(flag, 0))
