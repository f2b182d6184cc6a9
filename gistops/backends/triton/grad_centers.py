"""The gradient of the centres, and on the way what the centres add to that of the displacements.

    ∂w_k = Σ_i H'[i, k] f_i − s_k w_k − Σ_j T[k, j] δ_j        s_k = Σ_j T[k, j]
    ∂δ_j = ... − Σ_k T[k, j] w_k − (Σ_k T[k, j]) δ_j           T = R² U, 0 where a norm was clamped

The sums over j and over k are small matrix products. Of pairs that cancel, w_k and δ_j are summed before they are
weighted: they are left out of T, and the classes that have such pairs are made anew at the end, one by one. That takes
few registers; as tiles they would take so many that one program less fits a multiprocessor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import is_clamped


@triton.jit
def rates(rnorm, moment):
    """T of some slots of some classes."""
    return tl.where(is_clamped(rnorm), tl.zeros_like(rnorm), rnorm * rnorm * moment)


@triton.jit
def add_weighted(
    result, weights, vectors, SPLIT_BF16: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr
):
    """result + weights vectors, to the bits of float32 or nearly so. `vectors` are as they were loaded.

    SPLIT_BF16: the weights are split into two bfloat16, of 8 bits each, and vectors in bfloat16 are exact.
    """
    if SPLIT_BF16:
        high = weights.to(tl.bfloat16)
        low = (weights - high.to(tl.float32)).to(tl.bfloat16)
        result = tl.dot(high, vectors, result, out_dtype=ACC)
        return tl.dot(low, vectors, result, out_dtype=ACC)
    else:
        return tl.dot(weights, vectors.to(ACC), result, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def weighted(
    w, t, BLOCK_D: tl.constexpr, SPLIT_BF16: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr
):
    """w' t [dimensions, slots], as precise as `add_weighted`. The long side first: matrix instructions take 64 rows."""
    part = tl.zeros((BLOCK_D, 16), ACC)
    if SPLIT_BF16:
        high = t.to(tl.bfloat16)
        low = (t - high.to(tl.float32)).to(tl.bfloat16)
        part = tl.dot(tl.trans(w), high, part, out_dtype=ACC)
        return tl.dot(tl.trans(w), low, part, out_dtype=ACC)
    else:
        return tl.dot(tl.trans(w.to(ACC)), t, part, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def one_class(
    k,
    class_tile,
    dims,
    inside,
    weights,
    input,
    centers,
    displacements,
    grad,
    slots,
    center_rnorms,
    moments,
    input_rnorms,
    tau,
    grad_centers,
    parts,
    B,
    K,
    d,
    stride,
    M,
    row_stride,
    class_stride,
    BLOCK_D: tl.constexpr,
    NEED_CENTERS: tl.constexpr,
    NEED_DISPLACEMENTS: tl.constexpr,
    ACC: tl.constexpr,
):
    """∂w of a class with pairs that cancel, and what those pairs add to the parts of ∂δ."""
    k = tl.cast(k, tl.int64)
    row = parts + tl.cast(class_tile, tl.int64) * (M - 1) * d + dims  # of the first displacement
    result = tl.zeros((BLOCK_D,), ACC)
    for i in tl.range(0, B, num_stages=1):
        at = tl.cast(i, tl.int64)
        f = tl.load(input + at * d + dims, mask=inside, other=0.0).to(ACC)
        pair = at * row_stride + k * class_stride
        slot = tl.minimum(tl.load(slots + pair).to(tl.int32), M - 1)
        rnorm = tl.load(center_rnorms + slot.to(tl.int64) * K + k)
        if rnorm < 0:  # left out of H'
            h = -(tl.load(tau).to(ACC) * tl.load(input_rnorms + i) * tl.load(grad + pair) * rnorm)
            result += h * f
            if NEED_DISPLACEMENTS:
                target = row + (slot - 1) * d
                tl.store(target, tl.load(target, mask=inside, other=0.0) + h * f, mask=inside)
        elif NEED_CENTERS:
            result += tl.load(weights + k * stride + at).to(ACC) * f
    w = tl.load(centers + k * d + dims, mask=inside, other=0.0).to(ACC)
    for j in tl.range(0, M, num_stages=1):
        rnorm = tl.load(center_rnorms + tl.cast(j, tl.int64) * K + k)
        delta = tl.load(displacements + (j - 1) * d + dims, mask=inside & (j > 0), other=0.0).to(ACC)
        t = rates(rnorm, tl.load(moments + tl.cast(j, tl.int64) * K + k))
        correction = t * (w + delta)
        result -= correction
        if NEED_DISPLACEMENTS:  # noqa: SIM102
            if rnorm < 0:
                target = row + (j - 1) * d
                tl.store(target, tl.load(target, mask=inside, other=0.0) - correction, mask=inside)
    if NEED_CENTERS:
        tl.store(grad_centers + k * d + dims, result.to(grad_centers.dtype.element_ty), mask=inside)


@triton.jit
def grad_centers_kernel(
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
    products,  # with PRECOMPUTED H'f of the classes from `first` on: grad_centers, or memory of a wider dtype
    grad_centers,  # [K, d]
    parts,  # [class tiles, m, d]: of the gradient of the displacements
    first,  # class of the launch, a multiple of BLOCK_C
    B,
    K,
    d,
    stride,
    M,
    row_stride,  # of grad and slots
    class_stride,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    NEED_CENTERS: tl.constexpr,
    NEED_DISPLACEMENTS: tl.constexpr,
    PRECOMPUTED: tl.constexpr,  # H'f is there already
    SPLIT_BF16: tl.constexpr,  # how the corrections are multiplied: add_weighted
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    CORRECTION_PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A program: BLOCK_C classes, BLOCK_D dimensions. The tiles of one run of classes follow each other, for L2."""
    dim_tiles = tl.cdiv(d, BLOCK_D)
    class_tile = first // BLOCK_C + tl.program_id(0) // dim_tiles
    classes = class_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    dims = tl.program_id(0) % dim_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    class_valid = classes < K
    inside = dims < d
    result = tl.zeros((BLOCK_C, BLOCK_D), ACC)

    if NEED_CENTERS and not PRECOMPUTED:
        rows = tl.arange(0, BLOCK_B)
        h_tile = weights + classes.to(tl.int64)[:, None] * stride + rows[None, :]
        f_tile = input + rows.to(tl.int64)[:, None] * d + dims[None, :]
        for start in range(0, B, BLOCK_B):
            row_valid = rows < B - start
            skip = tl.cast(start, tl.int64)
            # H' has columns of zeros up to its stride: a mask by that, a multiple of 16, keeps the loads wide.
            known = class_valid[:, None] & (rows < stride - start)[None, :]
            h = tl.load(h_tile + start, mask=known, other=0.0)
            f = tl.load(f_tile + skip * d, mask=row_valid[:, None] & inside[None, :], other=0.0)
            if WIDEN:
                h = h.to(ACC)
                f = f.to(ACC)
            result = tl.dot(h, f, result, input_precision=PRECISION, out_dtype=ACC)

    valid = class_valid[:, None] & inside[None, :]
    elements = classes.to(tl.int64)[:, None] * d + dims[None, :]
    if NEED_CENTERS and PRECOMPUTED:
        result = tl.load(products - tl.cast(first, tl.int64) * d + elements, mask=valid, other=0.0).to(ACC)
    w = tl.load(centers + elements, mask=valid, other=0.0)
    if WIDEN:
        w = w.to(ACC)
    # Slot 0, the bare centre, has no displacement and cannot cancel.
    bare = tl.load(center_rnorms + classes, mask=class_valid, other=0.0)
    total = rates(bare, tl.load(moments + classes, mask=class_valid, other=0.0))
    marked = tl.zeros((BLOCK_C,), tl.int32)
    for start in tl.range(1, M, 16, num_stages=1):  # almost always one turn
        candidates = start + tl.arange(0, 16)
        offsets = candidates.to(tl.int64)[None, :] * K + classes[:, None]
        there = (candidates < M)[None, :] & class_valid[:, None]
        rnorm = tl.load(center_rnorms + offsets, mask=there, other=0.0)
        moment = tl.load(moments + offsets, mask=there, other=0.0)
        cancels = rnorm < 0
        marked = marked | tl.max(cancels.to(tl.int32), 1)
        t = tl.where(cancels, tl.zeros_like(rnorm), rates(rnorm, moment))
        total += tl.sum(t, 1)
        known = (candidates < M)[:, None] & inside[None, :]
        delta = tl.load(displacements + (candidates - 1)[:, None] * d + dims[None, :], mask=known, other=0.0)
        if WIDEN:
            delta = delta.to(ACC)
        if NEED_CENTERS:
            result = add_weighted(result, -t, delta, SPLIT_BF16, ACC, CORRECTION_PRECISION)
        if NEED_DISPLACEMENTS:
            part = tl.trans(weighted(w, t, BLOCK_D, SPLIT_BF16, ACC, CORRECTION_PRECISION))
            part += tl.sum(t, 0)[:, None] * delta.to(ACC)
            target = parts + (class_tile.to(tl.int64) * (M - 1) + candidates - 1)[:, None] * d + dims[None, :]
            tl.store(target, -part, mask=known)
    if NEED_CENTERS:
        result -= total[:, None] * w.to(ACC)
        tl.store(grad_centers + elements, result.to(grad_centers.dtype.element_ty), mask=valid)

    if tl.max(marked, 0) > 0:
        tl.debug_barrier()  # what is stored above is stored again
        for k in tl.range(class_tile * BLOCK_C, tl.minimum(K, class_tile * BLOCK_C + BLOCK_C), num_stages=1):
            mark = tl.sum(tl.where(classes == k, marked, tl.zeros_like(marked)), 0)
            if mark > 0:
                one_class(
                    k, class_tile, dims, inside, weights, input, centers, displacements, grad, slots,
                    center_rnorms, moments, input_rnorms, tau, grad_centers, parts, B, K, d, stride, M,
                    row_stride, class_stride, BLOCK_D, NEED_CENTERS, NEED_DISPLACEMENTS, ACC,
                )  # fmt: skip
