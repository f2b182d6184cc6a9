"""Partial log-sum-exps: a tile's maximum and sum of exponentials for each row, and how two of them merge.

A row's own target is left out of its log-sum-exp, so that a loss of 1e-20 keeps its digits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def local_targets(target, rows, row_valid, first_class, ignore_index):
    """Return the rows' targets, int32, counted from `first_class`, the first of a chunk; -1 for ignored rows."""
    y = tl.load(target + rows, mask=row_valid, other=0).to(tl.int64)
    local = tl.minimum(tl.maximum(y - first_class, -1), 2147483647)
    return tl.where(y == ignore_index, tl.full(y.shape, -1, tl.int64), local).to(tl.int32)


@triton.jit
def finite_shift(largest):
    """Return the maximum, or 0 in place of -inf: the shift of exponentials, since -inf - -inf would be NaN."""
    return tl.where(largest == float("-inf"), tl.zeros_like(largest), largest)


@triton.jit
def tile_lse(
    z,  # logits [classes, rows], without bias
    classes,
    class_valid,
    targets,  # from local_targets
    class_bias,
    class_weight,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Return for each row: the maximum of its non-target logits, Σ exp(logit - maximum) over them, and Σ weight·z.

    A NaN logit always reaches the sum of exponentials, but not always the maximum.
    """
    score = z
    if HAS_BIAS:
        score = score + tl.load(class_bias + classes, mask=class_valid, other=0.0).to(z.dtype)[:, None]
    counted = class_valid[:, None] & (classes[:, None] != targets[None, :])
    score = tl.where(counted, score, tl.full(z.shape, float("-inf"), z.dtype))
    largest = tl.max(score, 0)
    total = tl.sum(tl.exp(score - finite_shift(largest)[None, :]), 0)
    weighted = tl.zeros_like(largest)
    if SUMS:
        terms = z
        if HAS_WEIGHT:
            terms = z * tl.load(class_weight + classes, mask=class_valid, other=0.0).to(z.dtype)[:, None]
        weighted = tl.sum(tl.where(class_valid[:, None], terms, tl.zeros_like(terms)), 0)
    return largest, total, weighted


@triton.jit
def merge_lse(largest, total, more_largest, more_total):
    """Return the maximum and the sum of exponentials of two parts together."""
    joint = tl.maximum(largest, more_largest)
    shift = finite_shift(joint)
    return joint, total * tl.exp(largest - shift) + more_total * tl.exp(more_largest - shift)


@triton.jit
def store_lse(
    partials,  # [3, groups, B], or [2, groups, B] without SUMS
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
    """Store a class group's partials, as `tile_lse` returns them."""
    plane = tl.cast(groups, tl.int64) * B
    ptrs = partials + tl.cast(group, tl.int64) * B + rows
    tl.store(ptrs, largest, mask=row_valid)
    tl.store(ptrs + plane, total, mask=row_valid)
    if SUMS:
        tl.store(ptrs + 2 * plane, weighted, mask=row_valid)


@triton.jit
def store_class_sums(
    class_sums,  # [2, groups]: Σ weight, and Σ weight·bias
    start,  # first class of the group
    group_tiles,  # class tiles per group
    K,
    class_bias,
    class_weight,
    group,
    groups,
    BLOCK_C: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """Store a class group's sums over classes that label smoothing needs."""
    ACC: tl.constexpr = class_sums.dtype.element_ty
    weights = tl.zeros((BLOCK_C,), ACC)
    biases = tl.zeros((BLOCK_C,), ACC)
    for tile in range(group_tiles):
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
