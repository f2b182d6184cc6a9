"""The forward as one kernel: matrix product and maximum over slots, without the product P in memory.

    logits[i, k] = τ / |f_i| · max_j (P[i, k] + Q[i, j]) R[k, j]        P = f W', Q = f Δ', R = 1 / |w_k + δ_j|

The factor 1 / |f_i| is applied to the result, so no normalized copy of the input is made.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .max_over_slots import max_over_slots
from .numerics import load_tau


@triton.jit
def tile_products(
    input,
    centers,
    classes,
    class_valid,
    rows,
    row_valid,
    d,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Return a tile of P = W f' [classes, rows]."""
    dims = tl.arange(0, BLOCK_D)
    w_ptrs = centers + classes.to(tl.int64)[:, None] * d + dims[None, :]
    f_ptrs = input + rows.to(tl.int64)[:, None] * d + dims[None, :]
    products = tl.zeros((BLOCK_C, BLOCK_B), ACC)
    for start in range(0, d, BLOCK_D):
        inside = dims[None, :] < d - start
        w = tl.load(w_ptrs + start, mask=class_valid[:, None] & inside, other=0.0)
        f = tl.load(f_ptrs + start, mask=row_valid[:, None] & inside, other=0.0)
        if WIDEN:
            w = w.to(ACC)
            f = f.to(ACC)
        products = tl.dot(w, tl.trans(f), products, input_precision=PRECISION, out_dtype=ACC)
    return products


@triton.jit
def forward_kernel(
    input,  # [B, d]
    centers,  # [K, d]
    tau,  # one element
    input_rnorms,  # [B]
    shifts,  # [M, B]
    center_rnorms,  # [M, K]
    logits,  # [B, K]
    slots,  # [B, K], or unused
    B,
    K,
    d,
    M,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NEED_SLOTS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Compute logits and slots of BLOCK_C classes and BLOCK_B rows.

    Grid: class tiles x row tiles. Consecutive programs share a class tile, so that its centers stay in L2.
    """
    row_tiles = tl.cdiv(B, BLOCK_B)
    row_tile = tl.program_id(0) % row_tiles
    classes = tl.program_id(0) // row_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = row_tile * BLOCK_B + tl.arange(0, BLOCK_B)
    class_valid = classes < K
    row_valid = rows < B
    products = tile_products(
        input,
        centers,
        classes,
        class_valid,
        rows,
        row_valid,
        d,
        BLOCK_C,
        BLOCK_B,
        BLOCK_D,
        ACC,
        PRECISION,
        WIDEN,
    )

    # Logits of pairs that cancel are wrong here. rescore_cancelled_kernel overwrites them.
    best, slot = max_over_slots(
        products, classes, class_valid, rows, row_valid, center_rnorms, shifts, B, K, M, 0
    )
    scale = load_tau(tau, ACC) * tl.load(input_rnorms + rows, mask=row_valid, other=0.0)
    offsets = rows.to(tl.int64)[None, :] * K + classes[:, None]
    valid = row_valid[None, :] & class_valid[:, None]
    tl.store(logits + offsets, (best * scale[None, :]).to(logits.dtype.element_ty), mask=valid)
    if NEED_SLOTS:
        tl.store(slots + offsets, slot.to(tl.uint8), mask=valid)
