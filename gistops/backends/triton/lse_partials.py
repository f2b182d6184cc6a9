"""A tile's part of the log-sum-exp of its rows, and where a row's target is."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def local_targets(target, rows, row_valid, first, ignore_index):
    """The places of the rows' targets in a chunk of classes that begins at `first`, as int32; -1 where ignored."""
    y = tl.load(target + rows, mask=row_valid, other=0).to(tl.int64)
    place = tl.minimum(tl.maximum(y - first, -1), 2147483647)
    return tl.where(y == ignore_index, tl.full(y.shape, -1, tl.int64), place).to(tl.int32)


@triton.jit
def zero_if_minus_infinity(x):
    """0 in place of -inf: what may be subtracted from scores of which the largest is x."""
    return tl.where(x == float("-inf"), tl.zeros_like(x), x)


@triton.jit
def tile_lse(
    z,  # scores [classes, rows], without bias
    classes,
    class_valid,
    places,  # of the targets
    class_bias,
    class_weight,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Each [rows]: the maximum of all scores but the target's, the sum of their exponentials below it, Σ weight z.

    The target is left out, so that a loss of 1e-20 keeps its digits. NaN is in the sum, if not in the maximum.
    """
    score = z
    if HAS_BIAS:
        score = score + tl.load(class_bias + classes, mask=class_valid, other=0.0).to(z.dtype)[:, None]
    counted = class_valid[:, None] & (classes[:, None] != places[None, :])
    score = tl.where(counted, score, tl.full(z.shape, float("-inf"), z.dtype))
    largest = tl.max(score, 0)
    total = tl.sum(tl.exp(score - zero_if_minus_infinity(largest)[None, :]), 0)
    weighted = tl.zeros_like(largest)
    if SUMS:
        share = z
        if HAS_WEIGHT:
            share = z * tl.load(class_weight + classes, mask=class_valid, other=0.0).to(z.dtype)[:, None]
        weighted = tl.sum(tl.where(class_valid[:, None], share, tl.zeros_like(share)), 0)
    return largest, total, weighted


@triton.jit
def store_lse(
    partials,  # [3, groups, B]; two planes suffice without SUMS
    largest,
    total,
    weighted,
    group,
    groups,
    rows,
    row_valid,
    B,
    SUMS: tl.constexpr,
):
    """Keep what `tile_lse` made."""
    plane = tl.cast(groups, tl.int64) * B
    place = partials + tl.cast(group, tl.int64) * B + rows
    tl.store(place, largest, mask=row_valid)
    tl.store(place + plane, total, mask=row_valid)
    if SUMS:
        tl.store(place + 2 * plane, weighted, mask=row_valid)


@triton.jit
def merge_lse(largest, total, more_largest, more_total):
    """Maximum and sum of exponentials of two parts."""
    joint = tl.maximum(largest, more_largest)
    shift = zero_if_minus_infinity(joint)
    return joint, total * tl.exp(largest - shift) + more_total * tl.exp(more_largest - shift)


@triton.jit
def store_class_sums(
    class_sums,  # [2, groups]: Σ weight, and Σ weight bias
    start,  # class of the group
    run,  # class tiles of the group
    K,
    class_bias,
    class_weight,
    group,
    groups,
    BLOCK_C: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """Keep what a group of classes adds to the sums that label smoothing needs."""
    ACC: tl.constexpr = class_sums.dtype.element_ty
    weights = tl.zeros((BLOCK_C,), ACC)
    biases = tl.zeros((BLOCK_C,), ACC)
    for tile in range(run):
        classes = start + tile * BLOCK_C + tl.arange(0, BLOCK_C)
        weight = tl.where(classes < K, 1.0, 0.0).to(ACC)
        if HAS_WEIGHT:
            weight = tl.load(class_weight + classes, mask=classes < K, other=0.0).to(ACC)
        weights += weight
        if HAS_BIAS:
            biases += weight * tl.load(class_bias + classes, mask=classes < K, other=0.0).to(ACC)
    tl.store(class_sums + group, tl.sum(weights, 0))
    if HAS_BIAS:
        tl.store(class_sums + groups + group, tl.sum(biases, 0))
