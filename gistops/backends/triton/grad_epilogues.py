"""The last steps of the gradients of the input and of the displacements, after the products and the routed sums.

One launch serves both. Their programs are independent.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cancellation import cancelled_weights
from .numerics import is_clamped


@triton.jit
def grad_from_products(
    i,
    dims,
    inside,
    row_cancels,
    products,
    slot_weights,
    centers,
    displacements,
    grad,
    slots,
    center_rnorms,
    input_rnorms,
    tau,
    flags,
    B,
    K,
    d,
    M,
    groups,
    group_classes,
    split,
    row_stride,
    class_stride,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return g = H'W + S'Δ of row i for some dimensions, with the row's pairs that cancel added if there are any."""
    g = tl.load(products + i * d + dims, mask=inside, other=0.0)
    for j in tl.range(1, M, num_stages=1):
        delta = tl.load(displacements + (j - 1) * d + dims, mask=inside, other=0.0).to(ACC)
        g += tl.load(slot_weights + tl.cast(j, tl.int64) * B + i) * delta
    if row_cancels:
        for group in range(groups):
            if tl.load(flags + split * groups + group) > 0:
                last = tl.minimum((group + 1) * group_classes, K)
                for first in range(group * group_classes, last, BLOCK_C):
                    lanes = tl.arange(0, BLOCK_C)
                    classes = first + lanes
                    h, slot = cancelled_weights(
                        i, classes, classes < last, grad, slots, center_rnorms, input_rnorms, tau, K, M,
                        row_stride, class_stride,
                    )  # fmt: skip
                    if tl.max((h != 0).to(tl.int32), 0) > 0:  # true for NaN
                        for lane in range(BLOCK_C):
                            weight = tl.sum(tl.where(lanes == lane, h, tl.zeros_like(h)), 0)
                            if weight != 0:
                                j = tl.sum(tl.where(lanes == lane, slot, tl.zeros_like(slot)), 0)
                                elements = tl.cast(first + lane, tl.int64) * d + dims
                                w = tl.load(centers + elements, mask=inside, other=0.0)
                                delta = tl.load(displacements + (j - 1) * d + dims, mask=inside, other=0.0)
                                g += weight * (w.to(ACC) + delta.to(ACC))
    return g


@triton.jit
def coeffs_moment(i, input_coeffs, grad_coeffs, coeff_slots, BLOCK_G: tl.constexpr):
    """Return Σ_j X[i, j] ∂X[i, j] of rotations, the part of Σ_k G z that is not g·f. BLOCK_G is at least `coeff_slots`."""
    j = tl.arange(0, BLOCK_G)
    x = tl.load(input_coeffs + i * coeff_slots + j, mask=j < coeff_slots, other=0.0)
    grad = tl.load(grad_coeffs + i * coeff_slots + j, mask=j < coeff_slots, other=0.0)
    return tl.sum(x * grad, 0)


@triton.jit
def input_epilogue(
    i,
    products,
    slot_weights,
    input,
    centers,
    displacements,
    grad,
    slots,
    center_rnorms,
    input_rnorms,
    tau,
    flags,
    input_coeffs,
    grad_coeffs,
    grad_input,
    B,
    K,
    d,
    M,
    groups,
    group_classes,
    split_rows,
    row_stride,
    class_stride,
    coeff_slots,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    WHOLE: tl.constexpr,
    ROTATED: tl.constexpr,
    ACC: tl.constexpr,
):
    """Compute row i of ∂f = g − (g·f̂) f̂ with g = H'W + S'Δ. The factor 1/|f| is in H' already.

    With ROTATED, f enters the logits through its coefficients X too, but X is an argument of its own here. Only the norm
    of f depends on all terms: g·f becomes g·f + X·∂X.
    """
    split = i // split_rows
    i = tl.cast(i, tl.int64)
    input_rnorm = tl.load(input_rnorms + i)
    lanes = tl.arange(0, BLOCK_G)
    found = tl.zeros((BLOCK_G,), tl.int32)
    for start in tl.range(0, groups, BLOCK_G, num_stages=1):
        group = start + lanes
        found = found | tl.load(flags + split * groups + group, mask=group < groups, other=0)
    row_cancels = tl.max(found, 0) > 0
    by_coeffs = tl.zeros_like(input_rnorm)
    if ROTATED:
        by_coeffs = coeffs_moment(i, input_coeffs, grad_coeffs, coeff_slots, BLOCK_G) * input_rnorm
    if WHOLE:
        dims = tl.arange(0, BLOCK_D)
        inside = dims < d
        f = tl.load(input + i * d + dims, mask=inside, other=0.0).to(ACC)
        g = grad_from_products(
            i, dims, inside, row_cancels, products, slot_weights, centers, displacements, grad, slots, center_rnorms,
            input_rnorms, tau, flags, B, K, d, M, groups, group_classes, split, row_stride, class_stride,
            BLOCK_C, ACC,
        )  # fmt: skip
        along = (tl.sum(g * (f * input_rnorm), 0) + by_coeffs) * input_rnorm
        # A clamped norm is a constant, so there is no component to project out.
        along = tl.where(is_clamped(input_rnorm), tl.zeros_like(along), along)
        result = g - along * f
        tl.store(grad_input + i * d + dims, result.to(grad_input.dtype.element_ty), mask=inside)
    else:
        dot = tl.zeros((BLOCK_D,), ACC)
        for start in tl.range(0, d, BLOCK_D, num_stages=1):
            dims = start + tl.arange(0, BLOCK_D)
            inside = dims < d
            g = grad_from_products(
                i, dims, inside, row_cancels, products, slot_weights, centers, displacements, grad, slots, center_rnorms,
                input_rnorms, tau, flags, B, K, d, M, groups, group_classes, split, row_stride, class_stride,
                BLOCK_C, ACC,
            )  # fmt: skip
            tl.store(products + i * d + dims, g, mask=inside)
            f = tl.load(input + i * d + dims, mask=inside, other=0.0).to(ACC)
            dot += g * (f * input_rnorm)
        along = (tl.sum(dot, 0) + by_coeffs) * input_rnorm
        along = tl.where(is_clamped(input_rnorm), tl.zeros_like(along), along)
        tl.debug_barrier()
        for start in tl.range(0, d, BLOCK_D, num_stages=1):
            dims = start + tl.arange(0, BLOCK_D)
            inside = dims < d
            g = tl.load(products + i * d + dims, mask=inside, other=0.0)
            f = tl.load(input + i * d + dims, mask=inside, other=0.0).to(ACC)
            result = g - along * f
            tl.store(grad_input + i * d + dims, result.to(grad_input.dtype.element_ty), mask=inside)


@triton.jit
def displacement_epilogue(
    j,
    tile,
    slot_weights,
    input,
    partials,
    grad_displacements,
    B,
    d,
    m,
    class_tiles,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ACC: tl.constexpr,
):
    """Compute BLOCK_E dimensions of ∂δ_j = Σ_i S'[i, j] f_i − Σ_k T[k, j] (w_k + δ_j)."""
    dims = tile * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = dims < d
    lanes = tl.arange(0, BLOCK_R)
    result = tl.zeros((BLOCK_R, BLOCK_E), ACC)
    for start in range(0, B, BLOCK_R):
        rows = (start + lanes).to(tl.int64)
        weight = tl.load(slot_weights + tl.cast(j + 1, tl.int64) * B + rows, mask=rows < B, other=0.0)
        valid = (rows < B)[:, None] & inside[None, :]
        f = tl.load(input + rows[:, None] * d + dims[None, :], mask=valid, other=0.0).to(ACC)
        result += weight[:, None] * f
    for start in range(0, class_tiles, BLOCK_R):
        tiles = (start + lanes).to(tl.int64)
        valid = (tiles < class_tiles)[:, None] & inside[None, :]
        result += tl.load(partials + (tiles[:, None] * m + j) * d + dims[None, :], mask=valid, other=0.0)
    ptrs = grad_displacements + j * d + dims
    tl.store(ptrs, tl.sum(result, 0).to(grad_displacements.dtype.element_ty), mask=inside)


@triton.jit
def grad_epilogues_kernel(
    products,  # H'W [B, d] in ACC; overwritten by g unless WHOLE
    slot_weights,  # S' [M, B]
    input,  # [B, d]
    centers,  # [K, d]
    displacements,  # [m, d]
    grad,  # G [B, K], addressed by row_stride and class_stride
    slots,  # [B, K], addressed as grad is
    center_rnorms,  # [M, K]
    input_rnorms,  # [B]
    tau,  # one element
    flags,  # [splits, groups]
    partials,  # [class tiles, m, d], from grad_centers_kernel
    input_coeffs,  # X [B, coeff_slots] of rotations, or unused
    grad_coeffs,  # ∂X [B, coeff_slots], or unused
    grad_input,  # [B, d]
    grad_displacements,  # [m, d]
    B,
    K,
    d,
    M,
    groups,
    group_classes,  # classes per group
    split_rows,  # rows per split
    row_stride,  # distance between rows of grad and slots
    class_stride,
    class_tiles,
    coeff_slots,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,  # flags loaded at a time; at least coeff_slots
    BLOCK_R: tl.constexpr,  # rows, or class tiles, that ∂δ adds at a time
    BLOCK_E: tl.constexpr,  # dimensions of ∂δ
    WHOLE: tl.constexpr,  # BLOCK_D is at least d, so that one tile holds the row
    NEED_INPUT: tl.constexpr,
    NEED_DISPLACEMENTS: tl.constexpr,
    ROTATED: tl.constexpr,
    ACC: tl.constexpr,
):
    """Compute ∂f and ∂δ. Grid: rows, with NEED_INPUT; then displacements x dimension tiles, with NEED_DISPLACEMENTS."""
    program = tl.program_id(0)
    dim_tiles = tl.cdiv(d, BLOCK_E)
    rows = tl.num_programs(0)
    if NEED_DISPLACEMENTS:
        rows -= (M - 1) * dim_tiles
    if program < rows:
        if NEED_INPUT:
            input_epilogue(
                program, products, slot_weights, input, centers, displacements, grad, slots, center_rnorms,
                input_rnorms, tau, flags, input_coeffs, grad_coeffs, grad_input, B, K, d, M, groups, group_classes,
                split_rows, row_stride, class_stride, coeff_slots, BLOCK_C, BLOCK_D, BLOCK_G, WHOLE, ROTATED, ACC,
            )  # fmt: skip
    else:
        if NEED_DISPLACEMENTS:
            displacement_epilogue(
                (program - rows) // dim_tiles, (program - rows) % dim_tiles, slot_weights, input, partials,
                grad_displacements, B, d, M - 1, class_tiles, BLOCK_R, BLOCK_E, ACC,
            )  # fmt: skip
