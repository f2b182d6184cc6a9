"""Pairs that cancel, w_k close to -δ_j: their logits and their weights in the backward, computed from w_k + δ_j.

This is a kernel of its own because a branch in the forward would cost registers whether it is taken or not. Where no
pair cancels, which is almost always, a program reads the signs of its norms and ends.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import clamped_rnorm, load_tau


@triton.jit
def mark_cancelled(marks, center_rnorms, classes, class_valid, K, M):
    """Return marks [classes], int32, with a 1 added for classes in which a pair cancels."""
    for j in range(1, M):
        rnorm = tl.load(center_rnorms + tl.cast(j, tl.int64) * K + classes, mask=class_valid, other=0.0)
        marks = marks | (rnorm < 0).to(tl.int32)
    return marks


@triton.jit
def any_cancelled(center_rnorms, start, count, K, M):
    """Return true if a pair of the classes `start` to `start + count` cancels."""
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
def recomputed_logits(
    input,  # [B, d]
    centers,  # [K, d]
    displacements,  # [m, d]
    center_rnorms,  # [M, K]
    input_rnorms,  # [B]
    tau,  # one element
    classes,
    class_valid,
    rows,
    row_valid,
    K,
    d,
    M,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return logits and slots of a tile [classes, rows], computed from w_k + δ_j.

    Stores the norms of the pairs that cancel. They stay negative.
    """
    dims = tl.arange(0, BLOCK_D)
    w_ptrs = centers + classes.to(tl.int64)[:, None] * d + dims[None, :]
    f_ptrs = input + rows.to(tl.int64)[:, None] * d + dims[None, :]
    best = tl.full((BLOCK_C, BLOCK_B), float("-inf"), ACC)
    slot = tl.zeros((BLOCK_C, BLOCK_B), tl.int32)
    for j in range(M):
        products = tl.zeros((BLOCK_C, BLOCK_B), ACC)
        squares = tl.zeros((BLOCK_C,), ACC)
        for start in range(0, d, BLOCK_D):
            inside = dims < d - start
            w = tl.load(w_ptrs + start, mask=class_valid[:, None] & inside[None, :], other=0.0)
            f = tl.load(f_ptrs + start, mask=row_valid[:, None] & inside[None, :], other=0.0)
            delta = tl.load(displacements + (j - 1) * d + start + dims, mask=inside & (j > 0), other=0.0)
            vector = w.to(ACC) + delta.to(ACC)[None, :]
            squares += tl.sum(vector * vector, 1)
            products = tl.dot(vector, tl.trans(f.to(ACC)), products, input_precision="ieee", out_dtype=ACC)
        rnorm_ptrs = center_rnorms + tl.cast(j, tl.int64) * K + classes
        rnorm = tl.load(rnorm_ptrs, mask=class_valid, other=0.0)
        recomputed = clamped_rnorm(squares)
        # Other programs and later kernels may read the norm before or after this store. They use the sign alone.
        tl.store(rnorm_ptrs, -recomputed, mask=class_valid & (rnorm < 0))
        score = products * tl.where(rnorm < 0, recomputed, rnorm)[:, None]
        better = (score > best) | (score != score)
        best = tl.where(better, score, best)
        slot = tl.where(better, j, slot)
    scale = load_tau(tau, ACC) * tl.load(input_rnorms + rows, mask=row_valid, other=0.0)
    return best * scale[None, :], slot


@triton.jit
def cancelled_weights(
    row,
    classes,
    class_valid,
    grad,
    slots,
    center_rnorms,
    input_rnorms,
    tau,
    K,
    M,
    row_stride,
    class_stride,
):
    """Return the weights in H' of one row's pairs that cancel, 0 for all others, and the winning slots.

    The routing kernels leave these weights out.
    """
    offsets = tl.cast(row, tl.int64) * row_stride + classes.to(tl.int64) * class_stride
    slot = tl.minimum(tl.load(slots + offsets, mask=class_valid, other=0).to(tl.int32), M - 1)
    rnorm = tl.load(center_rnorms + slot.to(tl.int64) * K + classes, mask=class_valid, other=0.0)
    scale = load_tau(tau, rnorm.dtype) * tl.load(input_rnorms + row)
    g = tl.load(grad + offsets, mask=class_valid, other=0.0).to(rnorm.dtype)
    return tl.where(rnorm < 0, -(scale * g * rnorm), tl.zeros_like(g)), slot


@triton.jit
def rescore_cancelled_kernel(
    input,  # [B, d]
    centers,  # [K, d]
    displacements,  # [m, d]
    tau,  # one element
    input_rnorms,  # [B]
    logits,  # [B, K]
    slots,  # [B, K], or unused
    center_rnorms,  # [M, K]
    B,
    K,
    d,
    M,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NEED_SLOTS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Rewrite logits and slots of every class in which a pair cancels. Grid: tiles of BLOCK_C classes."""
    classes = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    class_valid = classes < K
    marks = mark_cancelled(tl.zeros((BLOCK_C,), tl.int32), center_rnorms, classes, class_valid, K, M)
    if tl.max(marks, 0) > 0:
        # If B is 0, the loop runs once, because the norms must still be written.
        for first in range(0, tl.maximum(B, 1), BLOCK_B):
            rows = first + tl.arange(0, BLOCK_B)
            row_valid = rows < B
            z, slot = recomputed_logits(
                input, centers, displacements, center_rnorms, input_rnorms, tau, classes, class_valid, rows, row_valid,
                K, d, M, BLOCK_C, BLOCK_B, BLOCK_D, ACC,
            )  # fmt: skip
            offsets = rows.to(tl.int64)[None, :] * K + classes[:, None]
            valid = row_valid[None, :] & class_valid[:, None] & (marks > 0)[:, None]
            tl.store(logits + offsets, z.to(logits.dtype.element_ty), mask=valid)
            if NEED_SLOTS:
                tl.store(slots + offsets, slot.to(tl.uint8), mask=valid)
