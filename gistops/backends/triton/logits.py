"""The launches of `logits_forward` and `logits_backward` of `torch.ops.gistops_triton`.

Nothing here waits for the GPU: tau is read on the device, and kernels there find out if a pair cancels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...operators.cross_entropy import padded_rows
from ...operators.logits import Logits, LogitsBackward, LogitsForward, LogitsGradients
from . import configs, gradients
from .argument_checks import check_shapes
from .cancellation import rescore_cancelled_kernel
from .configs import tiles
from .forward import forward_kernel
from .launch_args import LaunchArgs, multiply, on_device
from .max_over_slots import max_over_slots_kernel
from .norms import norms_in_registers_kernel, norms_kernel
from .routing import Needs, Saved


def forward(a: LogitsForward) -> Logits:
    """Return the outputs of `logits_forward`. The sign of center_rnorms marks pairs that cancel."""
    args = LaunchArgs.of(a.input, a.centers, a.displacements, a.tau, a.allow_tf32)
    B, K, d, M = args.sizes
    new = args.input.new_empty
    wanted = a.logits_dtype or args.acc_dtype
    # The kernels store logits of one more dtype, that of the operands; operands of several dtypes are promoted.
    logits = new(B, K, dtype=args.store_dtype if wanted == args.dtype else args.acc_dtype)
    slots = new((B, K) if a.need_slots else (0,), dtype=torch.uint8)
    center_rnorms, input_rnorms = new(M, K, dtype=args.acc_dtype), new(B, dtype=args.acc_dtype)
    output = Logits(logits, slots, center_rnorms, input_rnorms)
    if B + K == 0:
        return output._replace(logits=logits.to(wanted))
    with on_device(args.input.device):
        shifts = new(M, B, dtype=args.acc_dtype)
        compute_norms(args, shifts, center_rnorms, input_rnorms)
        if B > 0 and K > 0:
            score = (
                product_then_max
                if configs.product("forward", args.input.device, args.kind) == "cublas"
                else fused_forward
            )
            score(args, output, shifts, a.need_slots)
        if M > 1 and K > 0:
            classes, rows, dims = args.tile_sizes.rescore
            rescore_cancelled_kernel[(tiles(K, classes),)](
                args.input, args.centers, args.displacements, args.tau, input_rnorms, logits, slots, center_rnorms,
                B, K, d, M, BLOCK_C=classes, BLOCK_B=rows, BLOCK_D=dims,
                NEED_SLOTS=a.need_slots, **args.constants("ACC"),
            )  # fmt: skip
    return output._replace(logits=logits.to(wanted))


def product_then_max(args: LaunchArgs, out: Logits, shifts: Tensor, need_slots: bool) -> None:
    """Compute logits and slots by torch's product and a kernel for the maximum over slots."""
    B, K, _, M = args.sizes
    stride = padded_rows(B)
    scores = args.input.new_empty(K, stride, dtype=args.acc_dtype)
    multiply(args.centers, args.input.t(), scores[:, :B])
    classes, rows, warps = args.tile_sizes.max_over_slots
    max_over_slots_kernel[(tiles(K, classes) * tiles(B, rows),)](
        scores, out.center_rnorms, shifts, out.input_rnorms, args.tau, out.logits, out.slots, B, K, stride, M,
        BLOCK_C=classes, BLOCK_B=rows, UNROLLED_SLOTS=configs.unrolled_slots(M), NEED_SLOTS=need_slots,
        num_warps=warps, **args.constants("ACC"),
    )  # fmt: skip


def fused_forward(args: LaunchArgs, out: Logits, shifts: Tensor, need_slots: bool) -> None:
    """Compute logits and slots by one kernel."""
    B, K, d, M = args.sizes
    config = configs.choose("forward", args.input.device, args.kind, B, K, d)
    forward_kernel[(tiles(K, config.classes) * tiles(B, config.rows),)](
        args.input, args.centers, args.tau, out.input_rnorms, shifts, out.center_rnorms, out.logits, out.slots,
        B, K, d, M, NEED_SLOTS=need_slots, **args.constants("ACC", "PRECISION", "WIDEN"), **config.arguments(),
    )  # fmt: skip


def compute_norms(
    args: LaunchArgs, shifts: Tensor, center_rnorms: Tensor | None, input_rnorms: Tensor | None
) -> None:
    """Compute center_rnorms [M, K], and input_rnorms [B] with shifts [M, B], in one launch; None: not computed."""
    B, K, d, M = args.sizes
    B, K = 0 if input_rnorms is None else B, 0 if center_rnorms is None else K
    pointers = (
        args.input, args.centers, args.displacements, shifts if input_rnorms is None else input_rnorms, shifts,
        shifts if center_rnorms is None else center_rnorms,
    )  # fmt: skip
    elements, warps = args.tile_sizes.norms_in_registers
    dims = configs.power_of_two(d)
    if dims <= elements and configs.unrolled_slots(M):
        rows = min(elements // dims, 64 * warps)
        norms_in_registers_kernel[(tiles(B, rows) + tiles(K, rows),)](
            *pointers, B, K, d, BLOCK_R=rows, BLOCK_D=dims, UNROLLED_SLOTS=M, num_warps=warps,
            **args.constants("ACC", "WIDEN"),
        )  # fmt: skip
        return
    rows, dims = args.tile_sizes.norms
    slots = 1 if M == 1 else 16
    norms_kernel[(tiles(B, rows) + tiles(K, rows), tiles(M, slots))](
        *pointers, B, K, d, M, BLOCK_R=rows, BLOCK_D=dims, BLOCK_S=slots,
        **args.constants("ACC", "NORM_PRECISION", "WIDEN"),
    )  # fmt: skip


def backward(a: LogitsBackward) -> LogitsGradients:
    """Return the outputs of `logits_backward`: gradients, each empty if it is not needed."""
    args = LaunchArgs.of(a.input, a.centers, a.displacements, a.tau, a.allow_tf32)
    B, K, _, M = args.sizes
    saved_shapes = (
        ("grad", a.grad, (B, K)), ("logits", a.logits, (B, K)), ("slots", a.slots, (B, K)),
        ("center_rnorms", a.center_rnorms, (M, K)), ("input_rnorms", a.input_rnorms, (B,)),
    )  # fmt: skip
    check_shapes(a.input.device, saved_shapes)
    arguments = (a.input, a.centers, a.displacements, a.tau)
    needs = Needs(a.need_input, a.need_centers, a.need_displacements, a.need_tau)
    if B == 0 or K == 0 or not any(needs):
        computed = tuple(torch.zeros_like(x) for x in arguments)
    else:
        forward_output = (a.logits, a.slots, a.center_rnorms, a.input_rnorms)
        z, winners, rnorms, input_rnorms = (x.contiguous() for x in forward_output)
        grad = a.grad.contiguous()
        if (
            not grad.dtype == z.dtype == args.dtype
        ):  # the kernels read the dtype of the sums or of the operands
            grad, z = grad.to(args.acc_dtype), z.to(args.acc_dtype)
        saved = Saved(grad, z, winners, rnorms, input_rnorms)
        with on_device(args.input.device):
            computed = gradients.compute(args, saved, needs)
    return LogitsGradients(
        *(
            like_argument(x, g) if needed else x.new_empty(0)
            for g, x, needed in zip(computed, arguments, needs[:4], strict=True)
        )
    )


def like_argument(argument: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient in its argument's shape and dtype, without the padding of d."""
    if argument.shape != gradient.shape:
        if argument.dim() == gradient.dim() >= 2:
            gradient = gradient[..., : argument.shape[-1]]
        gradient = gradient.reshape(argument.shape)
    return gradient.to(argument.dtype).contiguous()
