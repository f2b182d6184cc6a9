"""`logits_forward` and `logits_backward` of `torch.ops.gistops_triton`: tensors in, kernels launched, tensors out.

Nothing here waits for the GPU: tau is read on the device, and whether any pair cancels is decided there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...operators.logits import Logits, LogitsBackward, LogitsForward, LogitsGradients
from . import configs, gradients
from .cancellation import rescore_cancelled_kernel
from .configs import Config, tiles
from .forward import forward_kernel
from .launch_args import LaunchArgs, multiply, on_device
from .max_over_slots import max_over_slots_kernel
from .norms import norms_in_registers_kernel, norms_kernel
from .routing import Needs, Saved


def forward(a: LogitsForward) -> Logits:
    """Return the outputs of `logits_forward`; the sign of center_rnorms marks pairs that cancel."""
    p = LaunchArgs.of(a.input, a.centers, a.displacements, a.tau, a.allow_tf32)
    B, K, d, M = p.sizes
    new = p.input.new_empty
    logits, slots = new(B, K, dtype=p.sums), new(B, K, dtype=torch.uint8)
    center_rnorms, input_rnorms = new(M, K, dtype=p.sums), new(B, dtype=p.sums)
    output = Logits(logits, slots, center_rnorms, input_rnorms)
    if B + K == 0:
        return output
    with on_device(p.input.device):
        shifts = new(M, B, dtype=p.sums)
        compute_norms(p, shifts, center_rnorms, input_rnorms)
        if B > 0 and K > 0:
            scored = around_product if configs.product("forward", p.kind) == "cublas" else fused
            scored(p, *output, shifts)  # but for pairs that cancel
        if M > 1 and K > 0:
            classes, rows, dims = p.small.rescore
            rescore_cancelled_kernel[(tiles(K, classes),)](
                p.input, p.centers, p.displacements, p.tau, input_rnorms, logits, slots, center_rnorms, B, K, d, M,
                BLOCK_C=classes, BLOCK_B=rows, BLOCK_D=dims, **p.constants("ACC"),
            )  # fmt: skip
    return output


def around_product(
    p: LaunchArgs, logits: Tensor, slots: Tensor, center_rnorms: Tensor, input_rnorms: Tensor, shifts: Tensor
) -> None:
    """torch's product, and a kernel that pools."""
    B, K, _, M = p.sizes
    stride = tiles(B, 16) * 16
    scores = p.input.new_empty(K, stride, dtype=p.sums)
    multiply(p.centers, p.input.t(), scores[:, :B])
    classes, rows, warps = p.small.max_over_slots
    max_over_slots_kernel[(tiles(K, classes) * tiles(B, rows),)](
        scores, center_rnorms, shifts, input_rnorms, p.tau, logits, slots, B, K, stride, M,
        BLOCK_C=classes, BLOCK_B=rows, UNROLLED_SLOTS=configs.unrolled_slots(M), num_warps=warps, **p.constants("ACC"),
    )  # fmt: skip


def fused(
    p: LaunchArgs, logits: Tensor, slots: Tensor, center_rnorms: Tensor, input_rnorms: Tensor, shifts: Tensor
) -> None:
    """One kernel that multiplies and pools."""
    B, K, d, M = p.sizes

    def launch(config: Config) -> None:
        forward_kernel[(tiles(K, config.classes) * tiles(B, config.rows),)](
            p.input, p.centers, p.tau, input_rnorms, shifts, center_rnorms, logits, slots, B, K, d, M,
            **p.constants("ACC", "PRECISION", "WIDEN"), **config.arguments(),
        )  # fmt: skip

    launch(configs.choose("forward", p.input.device, p.kind, B, K, d, launch))


def compute_norms(
    p: LaunchArgs, shifts: Tensor, center_rnorms: Tensor | None, input_rnorms: Tensor | None
) -> None:
    """Fill the norms of centres, or those of features and f·δ [M, B], or all in one launch."""
    B, K, d, M = p.sizes
    B, K = 0 if input_rnorms is None else B, 0 if center_rnorms is None else K
    elements, warps = p.small.norms_in_registers
    dims = configs.power_of_two(d)
    if dims <= elements and configs.unrolled_slots(M):
        rows = min(elements // dims, 64 * warps)
        norms_in_registers_kernel[(tiles(B, rows) + tiles(K, rows),)](
            p.input, p.centers, p.displacements, shifts if input_rnorms is None else input_rnorms, shifts,
            shifts if center_rnorms is None else center_rnorms, B, K, d, BLOCK_R=rows, BLOCK_D=dims,
            UNROLLED_SLOTS=M, num_warps=warps, **p.constants("ACC", "WIDEN"),
        )  # fmt: skip
        return
    rows, dims = p.small.norms
    slots = 1 if M == 1 else 16
    norms_kernel[(tiles(B, rows) + tiles(K, rows), tiles(M, slots))](
        p.input, p.centers, p.displacements, shifts if input_rnorms is None else input_rnorms, shifts,
        shifts if center_rnorms is None else center_rnorms, B, K, d, M, BLOCK_R=rows, BLOCK_D=dims, BLOCK_S=slots, **p.constants("ACC", "NORM_PRECISION", "WIDEN"),
    )  # fmt: skip


def backward(a: LogitsBackward) -> LogitsGradients:
    """Return the gradients of input, centers, displacements and tau, each empty where not needed."""
    p = LaunchArgs.of(a.input, a.centers, a.displacements, a.tau, a.allow_tf32)
    B, K, _, M = p.sizes
    for name, value, shape in (
        ("grad", a.grad, (B, K)),
        ("logits", a.logits, (B, K)),
        ("slots", a.slots, (B, K)),
        ("center_rnorms", a.center_rnorms, (M, K)),
        ("input_rnorms", a.input_rnorms, (B,)),
    ):
        if tuple(value.shape) != shape:
            raise RuntimeError(f"{name}: expected the forward's shape {list(shape)}, got {list(value.shape)}")
    arguments = (a.input, a.centers, a.displacements, a.tau)
    needs = Needs(a.need_input, a.need_centers, a.need_displacements, a.need_tau)
    if B == 0 or K == 0 or not any(needs):
        computed = tuple(torch.zeros_like(x) for x in arguments)
    else:
        forward_output = (a.logits, a.slots, a.center_rnorms, a.input_rnorms)
        z, winners, rnorms, input_rnorms = (x.contiguous() for x in forward_output)
        saved = Saved(a.grad.to(p.sums).contiguous(), z, winners, rnorms, input_rnorms)
        with on_device(p.input.device):
            computed = gradients.compute(p, saved, needs)
    return LogitsGradients(
        *(
            _like(x, g) if needed else x.new_empty(0)
            for g, x, needed in zip(computed, arguments, needs[:4], strict=True)
        )
    )


def _like(argument: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in its argument's shape and dtype, without the columns that only filled up d."""
    if argument.shape != gradient.shape:
        if argument.dim() == 2 and gradient.dim() == 2:
            gradient = gradient[:, : argument.shape[1]]
        gradient = gradient.reshape(argument.shape)
    return gradient.to(argument.dtype).contiguous()
