"""Logits around torch's own product: norms in one launch, P = W f' by the library, and one kernel that pools.

P is kept class by class, [K, ldB]: its rows start on whole vectors whatever K, and a library product with rows that do
not takes more than twice as long.

`max_over_slots` is what a kernel on such scores shares, the loss's too: it takes a tile P [classes, features], and per slot a
row of reciprocal norms [classes] and of f·δ_j [features]; it gives the best score without τ/|f_i|, and its slot.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _running_max(best, slot, j, products, classes, class_valid, rows, row_valid, center_rnorms, shifts, B, K):
    """Best scores and their slots, with slot j considered."""
    rnorm = tl.load(center_rnorms + tl.cast(j, tl.int64) * K + classes, mask=class_valid, other=0.0)
    shift = tl.load(shifts + tl.cast(j, tl.int64) * B + rows, mask=row_valid, other=0.0)
    score = (products + shift[None, :]) * rnorm[:, None]
    # The lowest of equals wins, and NaN gets through, as in torch.max.
    better = (score > best) | (score != score)
    return tl.where(better, score, best), tl.where(better, j, slot)


@triton.jit
def max_over_slots(
    products,
    classes,
    class_valid,
    rows,
    row_valid,
    center_rnorms,
    shifts,
    B,
    K,
    M,
    UNROLLED_SLOTS: tl.constexpr,
):
    """max_j (P + Q_j) R_j and the lowest j that attains it, for a tile of [classes, features].

    UNROLLED_SLOTS is M where that is small, so that nothing is left of the loop; otherwise 0.
    """
    best = products * tl.load(center_rnorms + classes, mask=class_valid, other=0.0)[:, None]
    slot = tl.zeros(products.shape, tl.int32)
    if UNROLLED_SLOTS > 0:
        for j in tl.static_range(1, UNROLLED_SLOTS):
            best, slot = _running_max(
                best, slot, j, products, classes, class_valid, rows, row_valid, center_rnorms, shifts, B, K
            )
    else:
        for j in tl.range(1, M, num_stages=1):
            best, slot = _running_max(
                best, slot, j, products, classes, class_valid, rows, row_valid, center_rnorms, shifts, B, K
            )
    return best, slot


@triton.jit
def max_over_slots_kernel(
    scores,  # P [K, stride]
    center_rnorms,  # [M, K]
    shifts,  # [M, B]
    input_rnorms,  # [B]
    tau,  # one element
    logits,  # [B, K]
    slots,  # [B, K]
    B,
    K,
    stride,
    M,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    UNROLLED_SLOTS: tl.constexpr,  # see `max_over_slots`
    ACC: tl.constexpr,
):
    """A program: BLOCK_C classes, BLOCK_B features, read class by class and written feature by feature.

    Scores of pairs that cancel are wrong here, and made anew by rescore_cancelled_kernel.
    """
    row_tiles = tl.cdiv(B, BLOCK_B)
    rows = tl.program_id(0) % row_tiles * BLOCK_B + tl.arange(0, BLOCK_B)
    classes = tl.program_id(0) // row_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    row_valid = rows < B
    class_valid = classes < K
    place = classes.to(tl.int64)[:, None] * stride + rows[None, :]
    inside = class_valid[:, None] & (rows < stride)[None, :]
    products = tl.load(scores + place, mask=inside, other=0.0)
    best, slot = max_over_slots(
        products, classes, class_valid, rows, row_valid, center_rnorms, shifts, B, K, M, UNROLLED_SLOTS
    )
    scale = tl.load(tau).to(ACC) * tl.load(input_rnorms + rows, mask=row_valid, other=0.0)
    offsets = rows.to(tl.int64)[None, :] * K + classes[:, None]
    valid = row_valid[None, :] & class_valid[:, None]
    tl.store(logits + offsets, best * scale[None, :], mask=valid)
    tl.store(slots + offsets, slot.to(tl.uint8), mask=valid)
