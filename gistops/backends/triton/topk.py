"""The launches of top-k: the norms, the lists of groups of classes, the classes in which a pair cancels, the merge.

Their number does not depend on the number of classes. Calls that the kernels do not serve are chunked: operands of
float64, whose score does not fit into a key with its class; k above 64, whose lists do not fit the registers; and those
that `operators.topk.can_fuse` excludes.
"""

from __future__ import annotations

import torch

from ...operators import topk as operators
from ...operators.topk import Best, FusedTopk, Topk
from . import configs
from .argument_checks import check_shapes
from .configs import power_of_two, tiles
from .launch_args import LaunchArgs, on_device
from .logits import compute_norms
from .tile_tables import TOPK_KEEP, TOPK_MERGE
from .topk_kernels import topk_cancelled_kernel, topk_merge_kernel, topk_partials_kernel


def can_fuse(a: Topk) -> bool:
    """Return True if the kernels serve the call."""
    wide = torch.float64 in (a.input.dtype, a.centers.dtype, a.displacements.dtype)
    return not wide and a.k <= TOPK_KEEP[-1] and operators.can_fuse(a)


def grouped(B: int, K: int, k: int, classes: int, rows: int) -> tuple[int, int]:
    """Return the number of class tiles per group, and the number of groups.

    All programs run at once, a program merges all lists of a row, and the lists take at most half the bytes of logits.
    """
    class_tiles = tiles(K, classes)
    wanted = min(configs.TOPK_PROGRAMS // tiles(B, rows), TOPK_MERGE[-1][0] // k, K // (4 * k), class_tiles)
    group_tiles = tiles(class_tiles, max(wanted, 1))
    return group_tiles, tiles(class_tiles, group_tiles)


def topk(a: FusedTopk) -> Best:
    """Return the k best classes of each row.

    Raises:
        RuntimeError: an argument does not fit.
    """
    args = LaunchArgs.of(a.input, a.centers, a.displacements, a.tau, a.allow_tf32)
    B, K, d, M = args.sizes
    k = a.k
    if not 1 <= k <= min(K, TOPK_KEEP[-1]):
        raise RuntimeError(f"k: expected an integer from 1 to {min(K, TOPK_KEEP[-1])}, got {k}")
    bias = None if a.class_bias is None else a.class_bias.contiguous()
    check_shapes(a.input.device, [("class_bias", bias, (K,))])
    new, acc = args.input.new_empty, args.acc_dtype
    out = Best(
        values=new(B, k, dtype=acc),
        classes=new(B, k, dtype=torch.int64),
        slots=new(B, k, dtype=torch.uint8),
        lse=new(B if a.need_lse else 0, dtype=acc),
    )
    if B == 0:
        return out
    tile, keep = configs.topk_tile(args.input.device, args.kind, k)
    group_tiles, groups = grouped(B, K, k, tile.classes, tile.rows)
    lists = new(B, groups, k, dtype=torch.int64)
    sums = new((2, B, groups) if a.need_lse else (0,), dtype=acc)
    shifts, input_rnorms, center_rnorms = (
        new(M, B, dtype=acc),
        new(B, dtype=acc),
        new(M, K, dtype=acc),
    )
    options = {"KEEP": keep, "HAS_BIAS": bias is not None, "NEED_LSE": a.need_lse, **args.constants("ACC")}
    with on_device(args.input.device):
        compute_norms(args, shifts, center_rnorms, input_rnorms)
        topk_partials_kernel[(groups * tiles(B, tile.rows),)](
            args.input, args.centers, center_rnorms, shifts, input_rnorms, args.tau, bias, lists, sums,
            B, K, d, M, k, group_tiles, groups, UNROLLED_SLOTS=configs.unrolled_slots(M), **tile.arguments(),
            **args.constants("PRECISION", "WIDEN"), **options,
        )  # fmt: skip
        if M > 1:
            classes, rows, dims = args.tile_sizes.rescore
            classes = min(classes, tile.classes)
            topk_cancelled_kernel[(groups,)](
                args.input, args.centers, args.displacements, center_rnorms, input_rnorms, args.tau, bias, lists, sums,
                B, K, d, M, k, group_tiles * (tile.classes // classes), groups,
                BLOCK_C=classes, BLOCK_B=rows, BLOCK_D=dims, **options,
            )  # fmt: skip
        block, warps = next(sizes for sizes in TOPK_MERGE if sizes[0] >= groups * k)
        topk_merge_kernel[(B,)](
            lists, sums, *out, B, groups, k, BLOCK=block, BLOCK_G=power_of_two(configs.TOPK_PROGRAMS),
            NEED_LSE=a.need_lse, num_warps=warps,
        )  # fmt: skip
    return out
