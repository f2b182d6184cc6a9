"""`gistops::triton_forward` and `triton_backward`: tensors in, kernels launched, tensors out.

Nothing here waits for the GPU: tau is read on the device, and whether any pair cancels is decided there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import configs, gradients
from .apart import apart_kernel
from .configs import FUSED_SLOTS, Config, tiles
from .forward import forward_kernel, norms_kernel
from .prepare import prepare_kernel
from .problem import Problem, on_device


def forward(
    input: Tensor, centers: Tensor, displacements: Tensor, tau: Tensor, allow_tf32: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [B, K], slots [B, K], center_rnorms [M, K], whose sign marks pairs that cancel, and input_rnorms [B]."""
    p = Problem.of(input, centers, displacements, tau, allow_tf32)
    B, K, d, M = p.sizes
    new = p.input.new_empty
    logits, slots = new(B, K, dtype=p.sums), new(B, K, dtype=torch.uint8)
    center_rnorms, input_rnorms = new(M, K, dtype=p.sums), new(B, dtype=p.sums)
    shifts, squares = new(M, B, dtype=p.sums), new(M, dtype=p.sums)
    with on_device(p.input.device):
        rows, depth = p.small.prepare
        prepare_kernel[(max(1, tiles(B, rows)), tiles(M, 16))](
            p.input, p.displacements, input_rnorms, shifts, squares, B, d, M,
            TILE_B=rows, TILE_D=depth, SLOTS=16, **p.constants("ACC", "NORM_PRECISION", "WIDEN"),
        )  # fmt: skip
        if K == 0:
            return logits, slots, center_rnorms, input_rnorms
        if M > FUSED_SLOTS:
            classes, depth = p.small.norms
            norms_kernel[(tiles(K, classes), tiles(M, 16))](
                p.centers, p.displacements, squares, center_rnorms, K, d, M,
                TILE_K=classes, TILE_D=depth, SLOTS=16, **p.constants("ACC", "NORM_PRECISION", "WIDEN"),
            )  # fmt: skip

        def launch(config: Config) -> None:
            grid = (tiles(K, config.classes) * max(1, tiles(B, config.features)),)
            forward_kernel[grid](
                p.input, p.centers, p.displacements, p.tau, input_rnorms, shifts, squares,
                logits, slots, center_rnorms, B, K, d, M,
                SLOTS=1 if M == 1 else FUSED_SLOTS if M <= FUSED_SLOTS else 0,
                **p.constants("ACC", "PRECISION", "NORM_PRECISION", "WIDEN"), **config.arguments(),
            )  # fmt: skip

        launch(configs.choose("forward", p.input.device, p.kind, B, K, d, M, launch))
        if M > 1:
            classes, rows, depth = p.small.apart
            apart_kernel[(tiles(K, classes),)](
                p.input, p.centers, p.displacements, p.tau, input_rnorms, logits, slots, center_rnorms, B, K, d, M,
                TILE_K=classes, TILE_B=rows, TILE_D=depth, **p.constants("ACC"),
            )  # fmt: skip
    return logits, slots, center_rnorms, input_rnorms


def backward(
    grad: Tensor,
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor,
    logits: Tensor,
    slots: Tensor,
    center_rnorms: Tensor,
    input_rnorms: Tensor,
    need_input: bool,
    need_centers: bool,
    need_displacements: bool,
    need_tau: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, centers, displacements and tau, each empty where not needed."""
    p = Problem.of(input, centers, displacements, tau, allow_tf32)
    B, K, _, M = p.sizes
    for name, value, shape in (
        ("grad", grad, (B, K)),
        ("logits", logits, (B, K)),
        ("slots", slots, (B, K)),
        ("center_rnorms", center_rnorms, (M, K)),
        ("input_rnorms", input_rnorms, (B,)),
    ):
        if tuple(value.shape) != shape:
            raise RuntimeError(f"{name}: expected the forward's shape {list(shape)}, got {list(value.shape)}")
    arguments = (input, centers, displacements, tau)
    needs = gradients.Needs(need_input, need_centers, need_displacements, need_tau)
    if B == 0 or K == 0 or not any(needs):
        made = tuple(torch.zeros_like(x) for x in arguments)
    else:
        saved = (grad.to(p.sums), logits, slots, center_rnorms, input_rnorms)
        with on_device(p.input.device):
            made = gradients.compute(p, gradients.Saved(*(x.contiguous() for x in saved)), needs)
    input, centers, displacements, tau = (
        _like(x, g) if needed else x.new_empty(0) for g, x, needed in zip(made, arguments, needs[:4], strict=True)
    )
    return input, centers, displacements, tau


def _like(argument: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in its argument's shape and dtype, without the columns that only filled up d."""
    if argument.shape != gradient.shape:
        if argument.dim() == 2 and gradient.dim() == 2:
            gradient = gradient[:, : argument.shape[1]]
        gradient = gradient.reshape(argument.shape)
    return gradient.to(argument.dtype).contiguous()
