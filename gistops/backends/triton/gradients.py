"""The launches of the backward: routing first, then the gradient of each argument."""

from __future__ import annotations

import torch
from torch import Tensor

from . import configs
from .configs import power_of_two
from .configs import tiles as tiles_of
from .grad_centers import grad_centers_kernel
from .grad_epilogues import grad_epilogues_kernel
from .launch_args import LaunchArgs, multiply
from .routing import Needs, Routed, Saved, route


def compute(args: LaunchArgs, saved: Saved, needs: Needs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of input, centers, displacements and tau, in `args.dtype` or wider; empty if not needed."""
    routed = route(args, saved, needs)
    return *from_routed(args, saved, routed, needs, args.store_dtype), routed.grad_tau


def from_routed(
    args: LaunchArgs, saved: Saved, routed: Routed, needs: Needs, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input, centers and displacements, the first and the last in `dtype`."""
    grad_centers, partials = centers_gradient(args, saved, routed, needs)
    grad_input, grad_displacements = epilogues(args, saved, routed, partials, needs, dtype)
    return grad_input, grad_centers, grad_displacements


def centers_gradient(args: LaunchArgs, saved: Saved, routed: Routed, needs: Needs) -> tuple[Tensor, Tensor]:
    """Return ∂w [K, d], and the partials [class tiles, m, d] of ∂δ that sum over classes; each empty if not needed."""
    B, K, d, M = args.sizes
    need_partials = needs.displacements and M > 1
    out = args.input.new_empty((K, d) if needs.centers else (0, d), dtype=args.store_dtype)
    if not needs.centers and not need_partials:
        return out, args.input.new_empty(0)

    precomputed = needs.centers and configs.product("centers", args.input.device, args.kind) == "cublas"

    config = configs.choose("centers", args.input.device, args.kind, B, K, d, smallest=precomputed)
    class_tiles = tiles_of(K, config.classes)
    # A product must be corrected before it is rounded, so it needs a wide buffer. In steps it stays in the cache.
    step, products = K, out
    if precomputed and out.dtype != args.acc_dtype:
        step = max(1, configs.STEP_ELEMENTS // (d * config.classes)) * config.classes
        products = args.input.new_empty(min(step, K), d, dtype=args.acc_dtype)
    partials = args.input.new_empty((class_tiles if need_partials else 0, M - 1, d), dtype=args.acc_dtype)
    for first in range(0, K, step):
        count = min(step, K - first)
        if precomputed:
            multiply(routed.weights[first : first + count, :B], args.input, products[:count])
        grad_centers_kernel[(tiles_of(count, config.classes) * tiles_of(d, config.dims),)](
            routed.weights, args.input, args.centers, args.displacements, saved.grad, saved.slots,
            saved.center_rnorms, routed.moments, saved.input_rnorms, args.tau, products, out, partials, first,
            B, K, d, routed.weights.shape[1], M, *saved.strides,
            NEED_CENTERS=needs.centers, NEED_DISPLACEMENTS=need_partials, PRECOMPUTED=precomputed,
            **args.constants("SPLIT_BF16", "ACC", "PRECISION", "CORRECTION_PRECISION", "WIDEN"),
            **config.arguments(),
        )  # fmt: skip
    return out, partials


def epilogues(
    args: LaunchArgs, saved: Saved, routed: Routed, partials: Tensor, needs: Needs, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return ∂f [B, d] and ∂δ [m, d]; each empty if not needed.

    The product H'W is torch's: fusing the epilogue would not save a pass over memory.
    """
    B, K, d, M = args.sizes
    new = args.input.new_empty
    grad_input = new((B, d) if needs.input else 0, dtype=dtype)
    grad_displacements = new((M - 1, d) if needs.displacements else 0, dtype=dtype)
    products = grad_input
    if needs.input:
        products = multiply(routed.weights[:, :B].t(), args.centers, new(B, d, dtype=args.acc_dtype))
    classes, dims = args.tile_sizes.grad_input_epilogue
    dims = min(dims, power_of_two(d))
    rows, tile_dims = args.tile_sizes.grad_displacements_epilogue
    need_displacements = needs.displacements and M > 1
    programs = (B if needs.input else 0) + ((M - 1) * tiles_of(d, tile_dims) if need_displacements else 0)
    if programs:
        grad_epilogues_kernel[(programs,)](
            products, routed.slot_weights, args.input, args.centers, args.displacements, saved.grad, saved.slots,
            saved.center_rnorms, saved.input_rnorms, args.tau, routed.flags, partials, args.input_coeffs,
            routed.input_coeffs, grad_input, grad_displacements,
            B, K, d, M, routed.flags.shape[1], routed.group_classes, routed.split_rows, *saved.strides,
            partials.shape[0], args.coeff_slots, BLOCK_C=classes, BLOCK_D=dims, BLOCK_G=256, BLOCK_R=rows, BLOCK_E=tile_dims,
            WHOLE=dims >= d, NEED_INPUT=needs.input, NEED_DISPLACEMENTS=need_displacements,
            ROTATED=args.input_coeffs is not None, num_warps=8 if dims > 1024 else 4, **args.constants("ACC"),
        )  # fmt: skip
    return grad_input, grad_displacements
