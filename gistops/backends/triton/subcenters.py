"""The loss of sub-centers, M vectors per class: the best of each class, and weights for the products of the backward.

Vector j of class k has index k·M + j, as in the memory of the centers [K, M, d]. The products take all K·M vectors at once;
the kernels of the loss see K classes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import load_tau


@triton.jit
def subcenter_scores_kernel(
    products,  # P [K·M, stride]
    center_rnorms,  # R [K, M]
    input_rnorms,  # [B]
    tau,  # one element
    scores,  # z [K, stride]: written
    slots,  # [K, stride]: written, or unused
    B,
    K,
    stride,  # B rounded up to a multiple of 16
    M,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    NEED_SLOTS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Compute z = τ / |f_i| · max_j P R and the lowest j that attains it, of BLOCK_C classes and BLOCK_B rows.

    NaN is the largest. Grid: class tiles x row tiles.
    """
    row_tiles = tl.cdiv(B, BLOCK_B)
    rows = tl.program_id(0) % row_tiles * BLOCK_B + tl.arange(0, BLOCK_B)
    classes = tl.program_id(0) // row_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    class_valid = classes < K
    # The stride is a multiple of 16; a mask by it, not by B, keeps the access wide.
    inside = class_valid[:, None] & (rows < stride)[None, :]
    columns = tl.cast(stride, tl.int64)
    vectors = products + (classes * M).to(tl.int64)[:, None] * columns + rows[None, :]
    rnorm = tl.load(center_rnorms + classes * M, mask=class_valid, other=0.0)
    best = tl.load(vectors, mask=inside, other=0.0) * rnorm[:, None]
    slot = tl.zeros((BLOCK_C, BLOCK_B), tl.int32)
    for j in range(1, M):
        rnorm = tl.load(center_rnorms + classes * M + j, mask=class_valid, other=0.0)
        score = tl.load(vectors + j * columns, mask=inside, other=0.0) * rnorm[:, None]
        better = (score > best) | ((score != score) & (best == best))
        best = tl.where(better, score, best)
        slot = tl.where(better, j, slot)
    scale = load_tau(tau, ACC) * tl.load(input_rnorms + rows, mask=rows < B, other=0.0)
    elements = classes.to(tl.int64)[:, None] * columns + rows[None, :]
    # The products are uninitialized from B on.
    valid = class_valid[:, None] & (rows < B)[None, :]
    tl.store(scores + elements, tl.where(valid, best * scale[None, :], tl.zeros_like(best)), mask=inside)
    if NEED_SLOTS:
        # Four at a time, as scores: wider stores would send all slots through shared memory.
        narrow = tl.max_contiguous(elements, (1, 4))
        tl.store(slots + narrow, tl.where(valid, slot, tl.zeros_like(slot)).to(tl.uint8), mask=inside)


@triton.jit
def expand_weights_kernel(
    weights,  # H' [K, stride] of the winning vectors
    slots,  # [K, stride]
    vector_weights,  # H' [K·M, stride]: written
    B,
    K,
    stride,
    M,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Give the winning vector of each pair its weight, and all others 0. Grid: class tiles x row tiles."""
    row_tiles = tl.cdiv(B, BLOCK_B)
    rows = tl.program_id(0) % row_tiles * BLOCK_B + tl.arange(0, BLOCK_B)
    classes = tl.program_id(0) // row_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (classes < K)[:, None] & (rows < stride)[None, :]
    columns = tl.cast(stride, tl.int64)
    elements = classes.to(tl.int64)[:, None] * columns + rows[None, :]
    h = tl.load(weights + elements, mask=inside, other=0.0)
    slot = tl.load(slots + tl.max_contiguous(elements, (1, 4)), mask=inside, other=0).to(tl.int32)
    vectors = vector_weights + (classes * M).to(tl.int64)[:, None] * columns + rows[None, :]
    for j in range(M):
        tl.store(vectors + j * columns, tl.where(slot == j, h, tl.zeros_like(h)), mask=inside)
