"""The maximum over slots, and the forward as two launches: P = W f' by torch's library, then the maximum by a kernel.

P is class-major, [K, ldB]. Its rows start at multiples of 16 elements whatever K is; a library product whose rows do
not takes more than twice as long.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import load_tau


@triton.jit
def _running_max(best, slot, j, products, classes, class_valid, rows, row_valid, center_rnorms, shifts, B, K):
    """Return the running maximum and its slot after slot j."""
    rnorm = tl.load(center_rnorms + tl.cast(j, tl.int64) * K + classes, mask=class_valid, other=0.0)
    shift = tl.load(shifts + tl.cast(j, tl.int64) * B + rows, mask=row_valid, other=0.0)
    score = (products + shift[None, :]) * rnorm[:, None]
    # The lowest slot wins a tie, and NaN wins over any number, as in torch.max.
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
    """Return max_j (P + Q_j) R_j, without the factor τ / |f_i|, and the lowest j that attains it.

    Args:
        products: a tile of P [classes, rows].
        center_rnorms: R [M, K].
        shifts: Q' [M, B].
        UNROLLED_SLOTS: M if it is small, so that the loop is unrolled; otherwise 0.
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
    slots,  # [B, K], or unused
    B,
    K,
    stride,
    M,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    UNROLLED_SLOTS: tl.constexpr,  # see max_over_slots
    NEED_SLOTS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Compute logits and slots of BLOCK_C classes and BLOCK_B rows: read class-major, written row-major.

    Grid: class tiles x row tiles. Logits of pairs that cancel are wrong here; rescore_cancelled_kernel overwrites them.
    """
    row_tiles = tl.cdiv(B, BLOCK_B)
    rows = tl.program_id(0) % row_tiles * BLOCK_B + tl.arange(0, BLOCK_B)
    classes = tl.program_id(0) // row_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    row_valid = rows < B
    class_valid = classes < K
    elements = classes.to(tl.int64)[:, None] * stride + rows[None, :]
    inside = class_valid[:, None] & (rows < stride)[None, :]
    products = tl.load(scores + elements, mask=inside, other=0.0)
    best, slot = max_over_slots(
        products, classes, class_valid, rows, row_valid, center_rnorms, shifts, B, K, M, UNROLLED_SLOTS
    )
    scale = load_tau(tau, ACC) * tl.load(input_rnorms + rows, mask=row_valid, other=0.0)
    offsets = rows.to(tl.int64)[None, :] * K + classes[:, None]
    valid = row_valid[None, :] & class_valid[:, None]
    tl.store(logits + offsets, (best * scale[None, :]).to(logits.dtype.element_ty), mask=valid)
    if NEED_SLOTS:
        tl.store(slots + offsets, slot.to(tl.uint8), mask=valid)
