"""Pairs that cancel: scored from w_k + δ_j written out, and their weights in the backward.

A kernel of its own, not a branch of the forward: the branch would cost the forward registers whether taken or not.
Where no pair cancels, which is almost always, a program reads M·BLOCK_C signs and ends.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import clamped_rnorm


@triton.jit
def recomputed_scores(
    input,  # [B, d]
    centers,  # [K, d]
    displacements,  # [m, d]
    center_rnorms,  # [M, K]
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
    """Scores without τ / |f_i|, and slots, of a tile's classes from w_k + δ_j written out; replaces norms of pairs that cancel."""
    dims = tl.arange(0, BLOCK_D)
    w_tile = centers + classes.to(tl.int64)[:, None] * d + dims[None, :]
    f_tile = input + rows.to(tl.int64)[:, None] * d + dims[None, :]
    best = tl.full((BLOCK_C, BLOCK_B), float("-inf"), ACC)
    slot = tl.zeros((BLOCK_C, BLOCK_B), tl.int32)
    for j in range(M):
        products = tl.zeros((BLOCK_C, BLOCK_B), ACC)
        squares = tl.zeros((BLOCK_C,), ACC)
        for start in range(0, d, BLOCK_D):
            inside = dims < d - start
            w = tl.load(w_tile + start, mask=class_valid[:, None] & inside[None, :], other=0.0)
            f = tl.load(f_tile + start, mask=row_valid[:, None] & inside[None, :], other=0.0)
            delta = tl.load(displacements + (j - 1) * d + start + dims, mask=inside & (j > 0), other=0.0)
            vector = w.to(ACC) + delta.to(ACC)[None, :]
            squares += tl.sum(vector * vector, 1)
            products = tl.dot(vector, tl.trans(f.to(ACC)), products, input_precision="ieee", out_dtype=ACC)
        known = center_rnorms + tl.cast(j, tl.int64) * K + classes
        rnorm = tl.load(known, mask=class_valid, other=0.0)
        direct = clamped_rnorm(squares)
        # Only the sign of what is replaced is used again, which stays.
        tl.store(known, -direct, mask=class_valid & (rnorm < 0))
        score = products * tl.where(rnorm < 0, direct, rnorm)[:, None]
        better = (score > best) | (score != score)
        best = tl.where(better, score, best)
        slot = tl.where(better, j, slot)
    return best, slot


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
    """The part that route_logits_grad_kernel left out of H': the weights of the pairs of one feature that cancel, and their slots."""
    offsets = tl.cast(row, tl.int64) * row_stride + classes.to(tl.int64) * class_stride
    slot = tl.minimum(tl.load(slots + offsets, mask=class_valid, other=0).to(tl.int32), M - 1)
    rnorm = tl.load(center_rnorms + slot.to(tl.int64) * K + classes, mask=class_valid, other=0.0)
    scale = tl.load(tau).to(rnorm.dtype) * tl.load(input_rnorms + row)
    g = tl.load(grad + offsets, mask=class_valid, other=0.0)
    return tl.where(rnorm < 0, -(scale * g * rnorm), tl.zeros_like(g)), slot


@triton.jit
def rescore_cancelled_kernel(
    input,  # [B, d]
    centers,  # [K, d]
    displacements,  # [m, d]
    tau,  # one element
    input_rnorms,  # [B]
    logits,  # [B, K]
    slots,  # [B, K]
    center_rnorms,  # [M, K]
    B,
    K,
    d,
    M,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program: BLOCK_C classes and all features. Rewrites the classes that hold such a pair, in all their slots."""
    classes = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    class_valid = classes < K
    marked = tl.zeros((BLOCK_C,), tl.int32)
    for j in range(1, M):
        rnorm = tl.load(center_rnorms + tl.cast(j, tl.int64) * K + classes, mask=class_valid, other=0.0)
        marked = marked | (rnorm < 0).to(tl.int32)
    if tl.max(marked, 0) > 0:
        for first in range(0, tl.maximum(B, 1), BLOCK_B):  # without features, the norms are still due
            rows = first + tl.arange(0, BLOCK_B)
            row_valid = rows < B
            best, slot = recomputed_scores(
                input, centers, displacements, center_rnorms, classes, class_valid, rows, row_valid, K, d, M,
                BLOCK_C, BLOCK_B, BLOCK_D, ACC,
            )  # fmt: skip
            scale = tl.load(tau).to(ACC) * tl.load(input_rnorms + rows, mask=row_valid, other=0.0)
            offsets = rows.to(tl.int64)[None, :] * K + classes[:, None]
            valid = row_valid[None, :] & class_valid[:, None] & (marked > 0)[:, None]
            tl.store(logits + offsets, best * scale[None, :], mask=valid)
            tl.store(slots + offsets, slot.to(tl.uint8), mask=valid)
