"""The sums over the parts that route_logits_grad_kernel leaves, all in one launch, each in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _reduce(parts, result, block, count, length, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """result [length] = Σ parts [count, length], for BLOCK_N of its elements."""
    place = block * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_P)
    inside = place < length
    total = tl.zeros((BLOCK_P, BLOCK_N), parts.dtype.element_ty)
    for start in range(0, count, BLOCK_P):
        part = start + lanes
        valid = (part < count)[:, None] & inside[None, :]
        offsets = part.to(tl.int64)[:, None] * length + place[None, :]
        total += tl.load(parts + offsets, mask=valid, other=0.0)
    tl.store(result + place, tl.sum(total, 0).to(result.dtype.element_ty), mask=inside)


@triton.jit
def reduce_partials_kernel(
    shares,  # [groups, M·B]
    moments,  # [splits, M·K]
    bias_parts,  # [splits, K]
    margin_parts,  # [splits, K]
    totals,  # [splits·groups]
    tau,  # one element
    shares_sum,  # [M·B]
    moments_sum,  # [M·K]
    bias_gradient,  # [K]
    margin_gradient,  # [K]
    tau_gradient,  # one element
    groups,
    splits,
    share_length,  # the lengths are 0 where nothing is to be summed
    moment_length,
    bias_length,
    margin_length,
    total_length,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A program: BLOCK_N elements of one of the results."""
    block = tl.program_id(0)
    ends = tl.cast(0, tl.int32) + (share_length + BLOCK_N - 1) // BLOCK_N
    if block < ends:
        _reduce(shares, shares_sum, block, groups, share_length, BLOCK_P, BLOCK_N)
    else:
        block -= ends
        ends = tl.cast(0, tl.int32) + (moment_length + BLOCK_N - 1) // BLOCK_N
        if block < ends:
            _reduce(moments, moments_sum, block, splits, moment_length, BLOCK_P, BLOCK_N)
        else:
            block -= ends
            ends = tl.cast(0, tl.int32) + (bias_length + BLOCK_N - 1) // BLOCK_N
            if block < ends:
                _reduce(bias_parts, bias_gradient, block, splits, bias_length, BLOCK_P, BLOCK_N)
            else:
                block -= ends
                ends = tl.cast(0, tl.int32) + (margin_length + BLOCK_N - 1) // BLOCK_N
                if block < ends:
                    _reduce(margin_parts, margin_gradient, block, splits, margin_length, BLOCK_P, BLOCK_N)
                else:
                    lanes = tl.arange(0, BLOCK_T)
                    total = tl.zeros((BLOCK_T,), totals.dtype.element_ty)
                    for start in range(0, total_length, BLOCK_T):
                        place = start + lanes
                        total += tl.load(totals + place, mask=place < total_length, other=0.0)
                    ratio = tl.sum(total, 0) / tl.load(tau).to(total.dtype)
                    tl.store(tau_gradient, ratio.to(tau_gradient.dtype.element_ty))
