"""The backward's kernels in order: route, then what each gradient asked for needs."""

from __future__ import annotations

import torch
from torch import Tensor

from . import configs
from .configs import Config, power_of_two
from .configs import tiles as tiles_of
from .grad_centers import grad_centers_kernel
from .grad_epilogues import grad_displacements_epilogue_kernel, grad_input_epilogue_kernel
from .launch_args import LaunchArgs, multiply
from .routing import Needs, Routed, Saved, route


def compute(p: LaunchArgs, saved: Saved, needs: Needs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients asked for, in the dtype of the problem or wider; others are empty."""
    routed = route(p, saved, needs)
    nothing = p.input.new_empty(0)
    of_input = input_gradient(p, saved, routed) if needs.input else nothing
    of_centers, parts = centers_gradient(p, saved, routed, needs)
    of_displacements = displacements_gradient(p, routed, parts) if needs.displacements else nothing
    return of_input, of_centers, of_displacements, routed.of_tau


def input_gradient(p: LaunchArgs, saved: Saved, routed: Routed, dtype: torch.dtype | None = None) -> Tensor:
    """∂f, from the product H'W by torch's own library: no epilogue of ours would save it a pass over memory."""
    B, K, d, M = p.sizes
    products = multiply(routed.weights[:, :B].t(), p.centers, p.input.new_empty(B, d, dtype=p.sums))
    out = p.input.new_empty(B, d, dtype=dtype or p.products)
    classes, dims = p.small.grad_input_epilogue
    dims = min(dims, power_of_two(d))
    grad_input_epilogue_kernel[(B,)](
        products, routed.shares, p.input, p.centers, p.displacements, saved.grad, saved.slots,
        saved.center_rnorms, saved.input_rnorms, p.tau, routed.flags, out,
        B, K, d, M, routed.flags.shape[1], routed.group_classes, routed.split_rows, *saved.strides,
        BLOCK_C=classes, BLOCK_D=dims, BLOCK_G=256, WHOLE=dims >= d, num_warps=8 if dims > 1024 else 4,
        **p.constants("ACC"),
    )  # fmt: skip
    return out


def centers_gradient(p: LaunchArgs, saved: Saved, routed: Routed, needs: Needs) -> tuple[Tensor, Tensor]:
    """∂w [K, d], and parts [class tiles, m, d] of ∂δ that sum over the classes; each empty where not needed."""
    B, K, d, M = p.sizes
    need_parts = needs.displacements and M > 1
    out = p.input.new_empty((K, d) if needs.centers else (0, d), dtype=p.products)
    parts = p.input.new_empty(0)
    if not needs.centers and not need_parts:
        return out, parts

    made = needs.centers and configs.product("centers", p.kind) == "cublas"

    def launch(config: Config) -> Tensor:
        class_tiles = tiles_of(K, config.classes)
        # A product is corrected before it is rounded. In steps, it never leaves the cache.
        step, products = K, out
        if made and out.dtype != p.sums:
            step = max(1, configs.STEP_ELEMENTS // (d * config.classes)) * config.classes
            products = p.input.new_empty(min(step, K), d, dtype=p.sums)
        parts = p.input.new_empty((class_tiles if need_parts else 0, M - 1, d), dtype=p.sums)
        for first in range(0, K, step):
            count = min(step, K - first)
            if made:
                multiply(routed.weights[first : first + count, :B], p.input, products[:count])
            grad_centers_kernel[(tiles_of(count, config.classes) * tiles_of(d, config.dims),)](
                routed.weights, p.input, p.centers, p.displacements, saved.grad, saved.slots, saved.center_rnorms,
                routed.moments, saved.input_rnorms, p.tau, products, out, parts, first,
                B, K, d, routed.weights.shape[1], M, *saved.strides,
                NEED_CENTERS=needs.centers, NEED_DISPLACEMENTS=need_parts, PRECOMPUTED=made,
                **p.constants("SPLIT_BF16", "ACC", "PRECISION", "CORRECTION_PRECISION", "WIDEN"), **config.arguments(),
            )  # fmt: skip
        return parts

    return out, launch(configs.choose("centers", p.input.device, p.kind, B, K, d, launch, smallest=made))


def displacements_gradient(
    p: LaunchArgs, routed: Routed, parts: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """∂δ [m, d]."""
    B, _, d, M = p.sizes
    out = p.input.new_empty(M - 1, d, dtype=dtype or p.products)
    if M > 1:
        rows, dims = p.small.grad_displacements_epilogue
        grad_displacements_epilogue_kernel[(tiles_of(d, dims), M - 1)](
            routed.shares, p.input, parts, out, B, d, M - 1, parts.shape[0],
            BLOCK_R=rows, BLOCK_D=dims, **p.constants("ACC"),
        )  # fmt: skip
    return out
