"""The loss of rotations: their logits from the products, and the gradients of their coefficients.

    z[k, i] = τ / (|f_i| |w_k|) · (P[k, i] + max_j t_j)        t_0 = 0, t_j = X[i, 0] Y[0, j, k] + X[i, j] Y[1, j, k]

X is input_coeffs [B, M] and Y class_coeffs [2, M, K], 0 in slot 0 (gistops/functional/transforms/rotation.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import load_tau
from .route_logits_grad import bound_weights


@triton.jit
def _input_coeffs(coeffs, j, rows, row_valid, M):
    """Return X of slot j."""
    return tl.load(coeffs + rows.to(tl.int64) * M + j, mask=row_valid, other=0.0)


@triton.jit
def _class_coeffs(coeffs, part, j, classes, class_valid, M, coeff_stride):
    """Return Y[part] of slot j."""
    return tl.load(
        coeffs + tl.cast(part * M + j, tl.int64) * coeff_stride + classes, mask=class_valid, other=0.0
    )


@triton.jit
def rotation_scores_kernel(
    scores,  # P [K, stride]; overwritten by z
    slots,  # [K, stride]: written, or unused
    center_rnorms,  # [K]
    input_rnorms,  # [B]
    tau,  # one element
    input_coeffs,  # X [B, M]
    class_coeffs,  # Y [2, M, K]
    B,
    K,
    stride,  # B rounded up to a multiple of 16
    M,
    coeff_stride,  # distance between slots of Y: the classes of all chunks
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    NEED_SLOTS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Compute logits and slots of BLOCK_C classes and BLOCK_B rows. The lowest slot wins a tie, and NaN is the largest.

    Grid: class tiles x row tiles.
    """
    row_tiles = tl.cdiv(B, BLOCK_B)
    rows = tl.program_id(0) % row_tiles * BLOCK_B + tl.arange(0, BLOCK_B)
    classes = tl.program_id(0) // row_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    row_valid = rows < B
    class_valid = classes < K
    shared = _input_coeffs(input_coeffs, 0, rows, row_valid, M)
    best = tl.zeros((BLOCK_C, BLOCK_B), ACC)
    slot = tl.zeros((BLOCK_C, BLOCK_B), tl.int32)
    for j in range(1, M):
        x = _input_coeffs(input_coeffs, j, rows, row_valid, M)
        y0 = _class_coeffs(class_coeffs, 0, j, classes, class_valid, M, coeff_stride)
        y1 = _class_coeffs(class_coeffs, 1, j, classes, class_valid, M, coeff_stride)
        term = shared[None, :] * y0[:, None] + x[None, :] * y1[:, None]
        better = (term > best) | ((term != term) & (best == best))
        best = tl.where(better, term, best)
        slot = tl.where(better, j, slot)
    rnorm = tl.load(center_rnorms + classes, mask=class_valid, other=0.0)
    scale = load_tau(tau, ACC) * tl.load(input_rnorms + rows, mask=row_valid, other=0.0)
    # The stride is a multiple of 16; a mask by it, not by B, keeps the access wide.
    inside = class_valid[:, None] & (rows < stride)[None, :]
    elements = classes.to(tl.int64)[:, None] * stride + rows[None, :]
    products = tl.load(scores + elements, mask=inside, other=0.0)
    # The products are uninitialized from B on.
    valid = class_valid[:, None] & row_valid[None, :]
    z = (products + best) * rnorm[:, None] * scale[None, :]
    tl.store(scores + elements, tl.where(valid, z, tl.zeros_like(z)), mask=inside)
    if NEED_SLOTS:
        # Four at a time, as scores: wider stores would send all slots through shared memory.
        narrow = tl.max_contiguous(elements, (1, 4))
        tl.store(slots + narrow, tl.where(valid, slot, tl.zeros_like(slot)).to(tl.uint8), mask=inside)


@triton.jit
def grad_coeffs_kernel(
    wide_weights,  # H' [K, stride], not rounded
    weights,  # [K, stride]: with ROUND written as H' for the products of the other gradients, or unused
    slots,  # [K, stride]
    center_rnorms,  # [K]
    input_rnorms,  # [B]
    input_coeffs,  # X [B, M]
    class_coeffs,  # Y [2, M, K]
    input_partials,  # [groups, B, M]: partials of ∂X
    class_partials,  # [row tiles, 2, M, K]: partials of ∂Y
    B,
    K,
    stride,
    M,
    coeff_stride,  # distance between slots of Y: the classes of all chunks
    group_tiles,  # class tiles per group
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ROUND: tl.constexpr,
    MAX_WEIGHT: tl.constexpr,  # the largest float16 if `weights` is float16; otherwise 0
    ACC: tl.constexpr,
):
    """Compute the parts of ∂X and ∂Y that a group of class tiles and BLOCK_B rows give. Grid: class groups x row tiles.

    With h = H' where slot j has won and 0 elsewhere: ∂X[i, 0] = Σ h Y[0, j, k] over all j, ∂X[i, j] = Σ h Y[1, j, k],
    ∂Y[0, j, k] = Σ h X[i, 0], ∂Y[1, j, k] = Σ h X[i, j]. Each slot reads the group again, which is in the cache then: sums
    of all slots would not fit into registers. These sums take H' as it is; a product in half precision takes it rounded.
    """
    row_tiles = tl.cdiv(B, BLOCK_B)
    row_tile = tl.program_id(0) % row_tiles
    group = tl.program_id(0) // row_tiles
    rows = row_tile * BLOCK_B + tl.arange(0, BLOCK_B)
    row_valid = rows < B
    lanes = tl.arange(0, BLOCK_C)
    begin = group * group_tiles * BLOCK_C
    end = tl.minimum(begin + group_tiles * BLOCK_C, K)
    shared = _input_coeffs(input_coeffs, 0, rows, row_valid, M)
    along = tl.zeros((BLOCK_C, BLOCK_B), ACC)
    input_out = input_partials + (tl.cast(group, tl.int64) * B + rows) * M
    class_out = class_partials + tl.cast(row_tile, tl.int64) * 2 * M * K
    second = tl.cast(M, tl.int64) * K  # from ∂Y[0] to ∂Y[1]
    for first in range(begin, end, BLOCK_C):
        classes = first + lanes
        class_valid = classes < K
        none = tl.zeros((BLOCK_C,), ACC)
        tl.store(class_out + classes, none, mask=class_valid)
        tl.store(class_out + second + classes, none, mask=class_valid)
        if ROUND:
            inside = class_valid[:, None] & (rows < stride)[None, :]
            elements = classes.to(tl.int64)[:, None] * stride + rows[None, :]
            weight = tl.load(wide_weights + elements, mask=inside, other=0.0)
            if MAX_WEIGHT > 0:
                center_rnorm = tl.load(center_rnorms + classes, mask=class_valid, other=0.0)
                input_rnorm = tl.load(input_rnorms + rows, mask=row_valid, other=0.0)
                weight = bound_weights(weight, center_rnorm[:, None], input_rnorm, 0, MAX_WEIGHT)
            narrow = tl.max_contiguous(elements, (1, 4))
            tl.store(weights + narrow, weight.to(weights.dtype.element_ty), mask=inside)
    for j in range(1, M):
        x = _input_coeffs(input_coeffs, j, rows, row_valid, M)
        across = tl.zeros((BLOCK_C, BLOCK_B), ACC)
        out = class_out + tl.cast(j, tl.int64) * K
        for first in range(begin, end, BLOCK_C):
            classes = first + lanes
            class_valid = classes < K
            inside = class_valid[:, None] & (rows < stride)[None, :]
            elements = classes.to(tl.int64)[:, None] * stride + rows[None, :]
            weight = tl.load(wide_weights + elements, mask=inside, other=0.0)
            slot = tl.load(slots + tl.max_contiguous(elements, (1, 4)), mask=inside, other=0).to(tl.int32)
            h = tl.where(slot == j, weight, tl.zeros_like(weight))
            y0 = _class_coeffs(class_coeffs, 0, j, classes, class_valid, M, coeff_stride)
            y1 = _class_coeffs(class_coeffs, 1, j, classes, class_valid, M, coeff_stride)
            along += h * y0[:, None]
            across += h * y1[:, None]
            tl.store(out + classes, tl.sum(h * shared[None, :], 1), mask=class_valid)
            tl.store(out + second + classes, tl.sum(h * x[None, :], 1), mask=class_valid)
        tl.store(input_out + j, tl.sum(across, 0), mask=row_valid)
    tl.store(input_out, tl.sum(along, 0), mask=row_valid)
