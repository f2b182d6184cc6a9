"""From products to scores, and to their tile's part of the log-sum-exp of each row, class by class.

    z[k, i] = τ / |f_i| · max_j (P[k, i] + Q[i, j]) R[k, j]        P = W f', Q = f Δ', R = 1 / |w_k + δ_j|

P comes from torch's own library. Rows of classes start on whole vectors whatever K, and the sums over the classes of
one feature stay within a thread but for the last step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .lse_partials import local_targets, merge_lse, store_class_sums, store_lse, tile_lse
from .max_over_slots import max_over_slots


@triton.jit
def lse_kernel(
    scores,  # P [K, stride]; with STASH replaced by z
    slots,  # [K, stride]: written with STASH
    center_rnorms,  # [M, K]
    shifts,  # [M, B]
    input_rnorms,  # [B]
    tau,  # one element
    target,  # [B]
    class_bias,  # [K], or unused
    class_weight,  # [K], or unused
    target_logits,  # [B]: of the rows whose target is here
    partials,  # [3, groups, B]
    class_sums,  # [2, groups]
    B,
    K,
    stride,  # B rounded up to a multiple of 16
    M,
    run,  # class tiles a group
    first,  # class of the chunk
    first_group,
    groups,  # of all chunks
    ignore_index,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    UNROLLED_SLOTS: tl.constexpr,  # see `max_over_slots`
    ACC: tl.constexpr,
    STASH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SUMS: tl.constexpr,  # of weight z, for label smoothing
):
    """A program: a group of class tiles, BLOCK_B features. Scores of pairs that cancel are wrong, and made anew later."""
    row_tiles = tl.cdiv(B, BLOCK_B)
    row_tile = tl.program_id(0) % row_tiles
    group = tl.program_id(0) // row_tiles
    rows = row_tile * BLOCK_B + tl.arange(0, BLOCK_B)
    row_valid = rows < B
    scale = tl.load(tau).to(ACC) * tl.load(input_rnorms + rows, mask=row_valid, other=0.0)
    places = local_targets(target, rows, row_valid, first, ignore_index)
    largest = tl.full((BLOCK_B,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_B,), ACC)
    weighted = tl.zeros((BLOCK_B,), ACC)
    found = tl.zeros((BLOCK_C, BLOCK_B), ACC)  # the targets' scores
    # The next tile is on its way while one is worked on.
    columns = (rows < stride)[None, :]
    offsets = tl.arange(0, BLOCK_C)[:, None] * stride + rows[None, :]
    begin = group * run * BLOCK_C
    last = tl.minimum(begin + run * BLOCK_C, K)
    first_inside = (begin + tl.arange(0, BLOCK_C) < K)[:, None] & columns
    ahead = tl.load(scores + tl.cast(begin, tl.int64) * stride + offsets, mask=first_inside, other=0.0)
    for tile in range(group * run, group * run + run):
        classes = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        class_valid = classes < K
        start = tl.cast(tile, tl.int64) * BLOCK_C * stride
        valid = class_valid[:, None] & row_valid[None, :]
        # A mask by the stride, a multiple of 16, keeps loads wide whatever B.
        inside = class_valid[:, None] & columns
        products = ahead
        more_inside = (classes + BLOCK_C < last)[:, None] & columns
        ahead = tl.load(scores + start + BLOCK_C * stride + offsets, mask=more_inside, other=0.0)
        best, slot = max_over_slots(
            products, classes, class_valid, rows, row_valid, center_rnorms, shifts, B, K, M, UNROLLED_SLOTS
        )
        z = tl.where(valid, best * scale[None, :], tl.zeros_like(best))
        slot = tl.where(valid, slot, tl.zeros_like(slot))  # beyond the batch are products that nobody wrote
        if STASH:
            tl.store(scores + start + offsets, z, mask=inside)
            # Four at a time, as scores are read: wider stores would send all slots through shared memory.
            narrow = tl.max_contiguous(offsets, (1, 4))
            tl.store(slots + start + narrow, slot.to(tl.uint8), mask=inside)
        own = valid & (classes[:, None] == places[None, :])
        found += tl.where(own, z, tl.zeros_like(z))
        more = tile_lse(z, classes, class_valid, places, class_bias, class_weight, HAS_BIAS, HAS_WEIGHT, SUMS)
        largest, total = merge_lse(largest, total, more[0], more[1])
        weighted += more[2]
    start_class = group * run * BLOCK_C
    here = row_valid & (places >= start_class) & (places < tl.minimum(start_class + run * BLOCK_C, K))
    tl.store(target_logits + rows, tl.sum(found, 0), mask=here)
    store_lse(partials, largest, total, weighted, first_group + group, groups, rows, row_valid, B, SUMS)
    if SUMS:  # noqa: SIM102
        if row_tile == 0:
            store_class_sums(
                class_sums, group * run * BLOCK_C, run, K, class_bias, class_weight, first_group + group, groups,
                BLOCK_C, HAS_BIAS, HAS_WEIGHT,
            )  # fmt: skip
