"""The gradient of the centers, and the part of the displacements' gradient that sums over classes.

    ∂w_k = Σ_i H'[i, k] f_i − s_k w_k − Σ_j T[k, j] δ_j        s_k = Σ_j T[k, j]
    ∂δ_j = ... − Σ_k T[k, j] w_k − (Σ_k T[k, j]) δ_j           T = R² U, 0 where a norm was clamped

The sums over j and over k are small matrix products. For pairs that cancel, w_k + δ_j must be summed before it is
weighted. Such pairs are left out of T, and their classes are recomputed at the end of the kernel, one at a time: as
tiles they would take so many registers that one program fewer fits a multiprocessor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import is_clamped, load_tau


@triton.jit
def norm_correction(rnorm, moment):
    """Return T for inverse norms R and moments U."""
    return tl.where(is_clamped(rnorm), tl.zeros_like(rnorm), rnorm * rnorm * moment)


@triton.jit
def split_bf16(x):
    """Return two bfloat16 tensors whose sum is x to about 16 bits."""
    high = x.to(tl.bfloat16)
    low = (x - high.to(tl.float32)).to(tl.bfloat16)
    return high, low


@triton.jit
def add_weighted(
    result, weights, vectors, SPLIT_BF16: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr
):
    """Return result + weights @ vectors, about as precise as float32. `vectors` are in the dtype of memory.

    With SPLIT_BF16 the weights are split into two bfloat16 tensors; the vectors are bfloat16 already.
    """
    if SPLIT_BF16:
        high, low = split_bf16(weights)
        result = tl.dot(high, vectors, result, out_dtype=ACC)
        return tl.dot(low, vectors, result, out_dtype=ACC)
    else:
        return tl.dot(weights, vectors.to(ACC), result, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def weighted_sums(
    w, t, BLOCK_D: tl.constexpr, SPLIT_BF16: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr
):
    """Return w' t [dims, slots], as precise as `add_weighted`. The long side is first: matrix instructions take 64 rows."""
    result = tl.zeros((BLOCK_D, 16), ACC)
    if SPLIT_BF16:
        high, low = split_bf16(t)
        result = tl.dot(tl.trans(w), high, result, out_dtype=ACC)
        return tl.dot(tl.trans(w), low, result, out_dtype=ACC)
    else:
        return tl.dot(tl.trans(w.to(ACC)), t, result, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def recompute_cancelled_class(
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
    partials,
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
    """Store ∂w of a class in which pairs cancel, and add those pairs to the partials of ∂δ."""
    k = tl.cast(k, tl.int64)
    first_ptrs = partials + tl.cast(class_tile, tl.int64) * (M - 1) * d + dims  # of the first displacement
    result = tl.zeros((BLOCK_D,), ACC)
    for i in tl.range(0, B, num_stages=1):
        row = tl.cast(i, tl.int64)
        f = tl.load(input + row * d + dims, mask=inside, other=0.0).to(ACC)
        pair = row * row_stride + k * class_stride
        slot = tl.minimum(tl.load(slots + pair).to(tl.int32), M - 1)
        rnorm = tl.load(center_rnorms + slot.to(tl.int64) * K + k)
        if rnorm < 0:  # this pair is not in H'
            h = -(load_tau(tau, ACC) * tl.load(input_rnorms + i) * tl.load(grad + pair).to(ACC) * rnorm)
            result += h * f
            if NEED_DISPLACEMENTS:
                ptrs = first_ptrs + (slot - 1) * d
                tl.store(ptrs, tl.load(ptrs, mask=inside, other=0.0) + h * f, mask=inside)
        elif NEED_CENTERS:
            result += tl.load(weights + k * stride + row).to(ACC) * f
    w = tl.load(centers + k * d + dims, mask=inside, other=0.0).to(ACC)
    for j in tl.range(0, M, num_stages=1):
        rnorm = tl.load(center_rnorms + tl.cast(j, tl.int64) * K + k)
        delta = tl.load(displacements + (j - 1) * d + dims, mask=inside & (j > 0), other=0.0).to(ACC)
        t = norm_correction(rnorm, tl.load(moments + tl.cast(j, tl.int64) * K + k))
        correction = t * (w + delta)
        result -= correction
        if NEED_DISPLACEMENTS:  # noqa: SIM102
            if rnorm < 0:
                ptrs = first_ptrs + (j - 1) * d
                tl.store(ptrs, tl.load(ptrs, mask=inside, other=0.0) - correction, mask=inside)
    if NEED_CENTERS:
        tl.store(grad_centers + k * d + dims, result.to(grad_centers.dtype.element_ty), mask=inside)


@triton.jit
def grad_centers_kernel(
    weights,  # H' [K, stride], class-major
    input,  # [B, d]
    centers,  # [K, d]
    displacements,  # [m, d]
    grad,  # G [B, K], addressed by row_stride and class_stride
    slots,  # [B, K], addressed as grad is
    center_rnorms,  # [M, K]
    moments,  # U [M, K]
    input_rnorms,  # [B]
    tau,  # one element
    products,  # with PRECOMPUTED, H'f of the classes from `first_class` on: grad_centers, or a buffer of a wider dtype
    grad_centers,  # [K, d]
    partials,  # [class tiles, m, d]: partial sums of the displacements' gradient
    first_class,  # the first class of this launch, a multiple of BLOCK_C
    B,
    K,
    d,
    stride,
    M,
    row_stride,  # distance between rows of grad and slots
    class_stride,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    NEED_CENTERS: tl.constexpr,
    NEED_DISPLACEMENTS: tl.constexpr,
    PRECOMPUTED: tl.constexpr,  # `products` holds H'f
    SPLIT_BF16: tl.constexpr,  # see add_weighted
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    CORRECTION_PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Compute ∂w of BLOCK_C classes and BLOCK_D dimensions, and their partial of ∂δ.

    Grid: class tiles x dimension tiles. Consecutive programs share a class tile, so that its H' stays in L2.
    """
    dim_tiles = tl.cdiv(d, BLOCK_D)
    class_tile = first_class // BLOCK_C + tl.program_id(0) // dim_tiles
    classes = class_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    dims = tl.program_id(0) % dim_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    class_valid = classes < K
    inside = dims < d
    result = tl.zeros((BLOCK_C, BLOCK_D), ACC)

    if NEED_CENTERS and not PRECOMPUTED:
        rows = tl.arange(0, BLOCK_B)
        h_ptrs = weights + classes.to(tl.int64)[:, None] * stride + rows[None, :]
        f_ptrs = input + rows.to(tl.int64)[:, None] * d + dims[None, :]
        for start in range(0, B, BLOCK_B):
            row_valid = rows < B - start
            skip = tl.cast(start, tl.int64)
            # H' is 0 from B up to its stride, a multiple of 16: a mask by the stride keeps the loads wide.
            h_valid = class_valid[:, None] & (rows < stride - start)[None, :]
            h = tl.load(h_ptrs + start, mask=h_valid, other=0.0)
            f = tl.load(f_ptrs + skip * d, mask=row_valid[:, None] & inside[None, :], other=0.0)
            if WIDEN:
                h = h.to(ACC)
                f = f.to(ACC)
            result = tl.dot(h, f, result, input_precision=PRECISION, out_dtype=ACC)

    valid = class_valid[:, None] & inside[None, :]
    elements = classes.to(tl.int64)[:, None] * d + dims[None, :]
    if NEED_CENTERS and PRECOMPUTED:
        result = tl.load(products - tl.cast(first_class, tl.int64) * d + elements, mask=valid, other=0.0).to(
            ACC
        )
    w = tl.load(centers + elements, mask=valid, other=0.0)
    if WIDEN:
        w = w.to(ACC)
    # Slot 0, the bare center, has no displacement and cannot cancel.
    bare_rnorm = tl.load(center_rnorms + classes, mask=class_valid, other=0.0)
    total = norm_correction(bare_rnorm, tl.load(moments + classes, mask=class_valid, other=0.0))
    marks = tl.zeros((BLOCK_C,), tl.int32)
    for start in tl.range(1, M, 16, num_stages=1):  # almost always one iteration
        slot_ids = start + tl.arange(0, 16)
        offsets = slot_ids.to(tl.int64)[None, :] * K + classes[:, None]
        pair_valid = (slot_ids < M)[None, :] & class_valid[:, None]
        rnorm = tl.load(center_rnorms + offsets, mask=pair_valid, other=0.0)
        moment = tl.load(moments + offsets, mask=pair_valid, other=0.0)
        cancels = rnorm < 0
        marks = marks | tl.max(cancels.to(tl.int32), 1)
        t = tl.where(cancels, tl.zeros_like(rnorm), norm_correction(rnorm, moment))
        total += tl.sum(t, 1)
        delta_valid = (slot_ids < M)[:, None] & inside[None, :]
        delta = tl.load(
            displacements + (slot_ids - 1)[:, None] * d + dims[None, :], mask=delta_valid, other=0.0
        )
        if WIDEN:
            delta = delta.to(ACC)
        if NEED_CENTERS:
            result = add_weighted(result, -t, delta, SPLIT_BF16, ACC, CORRECTION_PRECISION)
        if NEED_DISPLACEMENTS:
            partial = tl.trans(weighted_sums(w, t, BLOCK_D, SPLIT_BF16, ACC, CORRECTION_PRECISION))
            partial += tl.sum(t, 0)[:, None] * delta.to(ACC)
            ptrs = partials + (class_tile.to(tl.int64) * (M - 1) + slot_ids - 1)[:, None] * d + dims[None, :]
            tl.store(ptrs, -partial, mask=delta_valid)
    if NEED_CENTERS:
        result -= total[:, None] * w.to(ACC)
        tl.store(grad_centers + elements, result.to(grad_centers.dtype.element_ty), mask=valid)

    if tl.max(marks, 0) > 0:
        tl.debug_barrier()  # the code below overwrites what was stored above
        for k in tl.range(class_tile * BLOCK_C, tl.minimum(K, class_tile * BLOCK_C + BLOCK_C), num_stages=1):
            mark = tl.sum(tl.where(classes == k, marks, tl.zeros_like(marks)), 0)
            if mark > 0:
                recompute_cancelled_class(
                    k, class_tile, dims, inside, weights, input, centers, displacements, grad, slots,
                    center_rnorms, moments, input_rnorms, tau, grad_centers, partials, B, K, d, stride, M,
                    row_stride, class_stride, BLOCK_D, NEED_CENTERS, NEED_DISPLACEMENTS, ACC,
                )  # fmt: skip
