"""The gradient of the centres, and on the way what the centres add to that of the displacements.

    ∂w_k = Σ_i H'[i, k] f_i − Σ_j T[k, j] (w_k + δ_j)        T = R² U, 0 where a norm was clamped

With w_k + δ_j written out the correction does not cancel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numbers import is_clamped


@triton.jit
def weight_apart(
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
    """What route_kernel left out of H': the weights of the pairs of one feature that cancel, and their slots."""
    offsets = tl.cast(row, tl.int64) * row_stride + classes.to(tl.int64) * class_stride
    slot = tl.minimum(tl.load(slots + offsets, mask=class_valid, other=0).to(tl.int32), M - 1)
    rnorm = tl.load(center_rnorms + slot.to(tl.int64) * K + classes, mask=class_valid, other=0.0)
    scale = tl.load(tau).to(rnorm.dtype) * tl.load(input_rnorms + row)
    g = tl.load(grad + offsets, mask=class_valid, other=0.0)
    return tl.where(rnorm < 0, -(scale * g * rnorm), tl.zeros_like(g)), slot


@triton.jit
def centers_kernel(
    weights,  # H' [K, stride], class by class
    input,  # [B, d]
    centers,  # [K, d]
    displacements,  # [m, d]
    grad,  # [B, K] by row_stride and class_stride
    slots,  # likewise
    center_rnorms,  # [M, K]
    moments,  # U [M, K]
    input_rnorms,  # [B]
    tau,  # one element
    center_gradient,  # [K, d]
    parts,  # [class tiles, m, d]: of the gradient of the displacements
    B,
    K,
    d,
    stride,
    M,
    row_stride,  # of grad and slots
    class_stride,
    TILE_K: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_B: tl.constexpr,
    NEED_CENTERS: tl.constexpr,
    NEED_DISPLACEMENTS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A program: TILE_K classes, TILE_D dimensions. The tiles of one run of classes follow each other, for L2."""
    depth_tiles = tl.cdiv(d, TILE_D)
    class_tile = tl.program_id(0) // depth_tiles
    classes = class_tile * TILE_K + tl.arange(0, TILE_K)
    depth = tl.program_id(0) % depth_tiles * TILE_D + tl.arange(0, TILE_D)
    class_valid = classes < K
    inside = depth < d
    result = tl.zeros((TILE_K, TILE_D), ACC)

    # H'f of the pairs that cancel, one feature after the other. First, while few registers are taken.
    marks = tl.zeros((TILE_K,), tl.int32)
    for j in range(1, M):
        rnorm = tl.load(center_rnorms + tl.cast(j, tl.int64) * K + classes, mask=class_valid, other=0.0)
        marks = marks | (rnorm < 0).to(tl.int32)
    marked = tl.max(marks, 0) > 0
    if marked:
        if NEED_CENTERS:
            for i in range(B):
                h, _ = weight_apart(
                    i, classes, class_valid, grad, slots, center_rnorms, input_rnorms, tau, K, M,
                    row_stride, class_stride,
                )
                f = tl.load(input + tl.cast(i, tl.int64) * d + depth, mask=inside, other=0.0).to(ACC)
                result += h[:, None] * f[None, :]
        if NEED_DISPLACEMENTS:
            for j in range(1, M):
                part = tl.zeros((TILE_D,), ACC)
                for i in range(B):
                    h, slot = weight_apart(
                        i, classes, class_valid, grad, slots, center_rnorms, input_rnorms, tau, K, M,
                    row_stride, class_stride,
                    )
                    share = tl.sum(tl.where(slot == j, h, tl.zeros_like(h)), 0)
                    f = tl.load(input + tl.cast(i, tl.int64) * d + depth, mask=inside, other=0.0).to(ACC)
                    part += share * f
                target = parts + (tl.cast(class_tile, tl.int64) * (M - 1) + j - 1) * d + depth
                tl.store(target, part, mask=inside)
            tl.debug_barrier()  # what is stored here is read again below

    if NEED_CENTERS:
        features = tl.arange(0, TILE_B)
        h_tile = weights + classes.to(tl.int64)[:, None] * stride + features[None, :]
        f_tile = input + features.to(tl.int64)[:, None] * d + depth[None, :]
        for start in range(0, B, TILE_B):
            row_valid = features < B - start
            skip = tl.cast(start, tl.int64)
            h = tl.load(h_tile + start, mask=class_valid[:, None] & row_valid[None, :], other=0.0)
            f = tl.load(f_tile + skip * d, mask=row_valid[:, None] & inside[None, :], other=0.0)
            if WIDEN:
                h = h.to(ACC)
                f = f.to(ACC)
            result = tl.dot(h, f, result, input_precision=PRECISION, out_dtype=ACC)

    valid = class_valid[:, None] & inside[None, :]
    elements = classes.to(tl.int64)[:, None] * d + depth[None, :]
    w = tl.load(centers + elements, mask=valid, other=0.0).to(ACC)
    for j in range(M):
        row = tl.cast(j, tl.int64) * K
        rnorm = tl.load(center_rnorms + row + classes, mask=class_valid, other=0.0)
        moment = tl.load(moments + row + classes, mask=class_valid, other=0.0)
        t = tl.where(is_clamped(rnorm), tl.zeros_like(rnorm), rnorm * rnorm * moment)
        delta = tl.load(displacements + (j - 1) * d + depth, mask=inside & (j > 0), other=0.0).to(ACC)
        correction = t[:, None] * (w + delta[None, :])
        if NEED_CENTERS:
            result -= correction
        if NEED_DISPLACEMENTS:
            target = parts + (tl.cast(class_tile, tl.int64) * (M - 1) + j - 1) * d + depth
            part = tl.zeros((TILE_D,), ACC)
            if marked:
                part = tl.load(target, mask=inside & (j > 0), other=0.0)
            tl.store(target, part - tl.sum(correction, 0), mask=inside & (j > 0))
    if NEED_CENTERS:
        tl.store(center_gradient + elements, result.to(center_gradient.dtype.element_ty), mask=valid)
