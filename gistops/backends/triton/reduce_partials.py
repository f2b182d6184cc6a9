"""The sums over the partials that the routing kernels write: one launch, each sum in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import load_tau


@triton.jit
def _sum_partials(partials, result, block, count, length, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store BLOCK_N elements of result [length] = Σ partials [count, length]."""
    elements = block * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_P)
    inside = elements < length
    total = tl.zeros((BLOCK_P, BLOCK_N), partials.dtype.element_ty)
    for start in range(0, count, BLOCK_P):
        part = start + lanes
        valid = (part < count)[:, None] & inside[None, :]
        offsets = part.to(tl.int64)[:, None] * length + elements[None, :]
        total += tl.load(partials + offsets, mask=valid, other=0.0)
    tl.store(result + elements, tl.sum(total, 0).to(result.dtype.element_ty), mask=inside)


@triton.jit
def reduce_partials_kernel(
    by_row,  # S' [groups, M·B], or ∂X of rotations [groups, B·M]
    moments,  # U [splits, M·K]
    bias_partials,  # [splits, K]
    margin_partials,  # [splits, K]
    coeff_partials,  # ∂Y of rotations [row tiles, 2·M·K]
    tau_partials,  # τ ∂τ [splits·groups]
    tau,  # one element
    sum_by_row,  # [M·B]
    moments_sum,  # [M·K]
    grad_bias,  # [K]
    grad_margin,  # [K]
    grad_coeffs,  # [2·M·K]
    grad_tau,  # one element
    groups,
    splits,
    row_tiles,
    by_row_length,  # each length is 0 if that sum is not needed
    moments_length,
    bias_length,
    margin_length,
    coeffs_length,
    tau_length,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Compute BLOCK_N elements of one of the sums, or the gradient of τ.

    Grid: the blocks of the five sums one after the other, then one program for τ.
    """
    block = tl.program_id(0)
    blocks = tl.cast(0, tl.int32) + (by_row_length + BLOCK_N - 1) // BLOCK_N
    if block < blocks:
        _sum_partials(by_row, sum_by_row, block, groups, by_row_length, BLOCK_P, BLOCK_N)
    else:
        block -= blocks
        blocks = tl.cast(0, tl.int32) + (moments_length + BLOCK_N - 1) // BLOCK_N
        if block < blocks:
            _sum_partials(moments, moments_sum, block, splits, moments_length, BLOCK_P, BLOCK_N)
        else:
            block -= blocks
            blocks = tl.cast(0, tl.int32) + (bias_length + BLOCK_N - 1) // BLOCK_N
            if block < blocks:
                _sum_partials(bias_partials, grad_bias, block, splits, bias_length, BLOCK_P, BLOCK_N)
            else:
                block -= blocks
                blocks = tl.cast(0, tl.int32) + (margin_length + BLOCK_N - 1) // BLOCK_N
                if block < blocks:
                    _sum_partials(
                        margin_partials, grad_margin, block, splits, margin_length, BLOCK_P, BLOCK_N
                    )
                else:
                    block -= blocks
                    blocks = tl.cast(0, tl.int32) + (coeffs_length + BLOCK_N - 1) // BLOCK_N
                    if block < blocks:
                        _sum_partials(
                            coeff_partials, grad_coeffs, block, row_tiles, coeffs_length, BLOCK_P, BLOCK_N
                        )
                    else:
                        lanes = tl.arange(0, BLOCK_T)
                        total = tl.zeros((BLOCK_T,), tau_partials.dtype.element_ty)
                        for start in range(0, tau_length, BLOCK_T):
                            elements = start + lanes
                            total += tl.load(tau_partials + elements, mask=elements < tau_length, other=0.0)
                        ratio = tl.sum(total, 0) / load_tau(tau, total.dtype)
                        tl.store(grad_tau, ratio.to(grad_tau.dtype.element_ty))
