"""The ops `cross_entropy_forward` and `cross_entropy_backward`: the whole loss, for GPUs.

Graphs (torch.compile, export) hold these ops; eager mode calls their kernels directly (`backends/eager_loss.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .registry import Op, SymInt, compute_dtype, no_double_backward

MARGIN_KINDS = {"logit": 0, "cosine": 1, "angle": 2}
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


class CrossEntropyForward(NamedTuple):
    """Arguments of `cross_entropy_forward`."""

    input: Tensor
    centers: Tensor  # [K, d]; sub-centers [K, M, d]
    displacements: Tensor  # [m, d]; [0, d] with sub-centers and rotations
    tau: Tensor
    input_coeffs: Tensor | None  # of rotations, as in `rotation_forward`; both coefficients or neither
    class_coeffs: Tensor | None
    target: Tensor
    class_bias: Tensor | None
    weight: Tensor | None
    margin: Tensor | None  # one element, or K
    margin_kind: int  # a value of MARGIN_KINDS
    reduction: int  # a value of REDUCTIONS
    ignore_index: SymInt
    label_smoothing: float
    keep_scores: (
        bool  # return scores and slots for the backward; if False, they are empty and recomputed there
    )
    allow_tf32: bool = False


class CrossEntropy(NamedTuple):
    """Outputs of `cross_entropy_forward`."""

    loss: Tensor
    lse: Tensor  # [B], with bias and margin
    in_range: Tensor  # [1], True if every target is in range
    scores: Tensor  # [K, padded_rows(B)]; undefined in columns from B on
    slots: Tensor  # [K, padded_rows(B)]
    center_rnorms: Tensor  # [M, K]; rotations [1, K], because all slots of a class have one norm
    input_rnorms: Tensor
    rows: Tensor  # [n, B], saved for the backward
    scalars: Tensor  # [2], saved for the backward


class CrossEntropyBackward(NamedTuple):
    """Arguments of `cross_entropy_backward`."""

    grad_loss: Tensor | None
    grad_lse: Tensor | None
    input: Tensor
    centers: Tensor
    displacements: Tensor
    tau: Tensor
    input_coeffs: Tensor | None
    class_coeffs: Tensor | None
    target: Tensor
    class_bias: Tensor | None
    weight: Tensor | None
    margin: Tensor | None
    lse: Tensor
    scores: Tensor
    slots: Tensor
    center_rnorms: Tensor
    input_rnorms: Tensor
    rows: Tensor
    scalars: Tensor
    margin_kind: int
    reduction: int
    ignore_index: SymInt
    label_smoothing: float
    need_input: bool
    need_centers: bool
    need_displacements: bool
    need_tau: bool
    need_bias: bool
    need_margin: bool
    allow_tf32: bool = False


class CrossEntropyGradients(NamedTuple):
    """Outputs of `cross_entropy_backward`."""

    grad_input: Tensor
    grad_centers: Tensor
    grad_displacements: Tensor
    grad_tau: Tensor
    grad_input_coeffs: Tensor  # computed wherever there are coefficients, in the dtype of the logits
    grad_class_coeffs: Tensor
    grad_class_bias: Tensor
    grad_margin: Tensor


def padded_rows(batch: int) -> int:
    """Return the row length of class-major scores: the batch size rounded up to a multiple of 16."""
    return -(-batch // 16) * 16


def _forward_fake(a: CrossEntropyForward) -> CrossEntropy:
    dtype = compute_dtype(a.input, a.centers, a.displacements)
    B, K = a.input.shape[0], a.centers.shape[0]
    kept = (K, padded_rows(B)) if a.keep_scores else (0, 0)
    new = a.input.new_empty
    slots = a.displacements.shape[0] + 1 if a.centers.dim() == 2 else a.centers.shape[1]
    return CrossEntropy(
        loss=new((B,) if a.reduction == 0 else (), dtype=dtype),
        lse=new(B, dtype=dtype),
        in_range=new(1, dtype=torch.bool),
        scores=new(kept, dtype=dtype),
        slots=new(kept, dtype=torch.uint8),
        center_rnorms=new(slots, K, dtype=dtype),
        input_rnorms=new(B, dtype=dtype),
        rows=new(2 if a.margin is None else 5, B, dtype=dtype),
        scalars=new(2, dtype=dtype),
    )


def _backward_fake(a: CrossEntropyBackward) -> CrossEntropyGradients:
    def empty(argument: Tensor | None, needed: bool) -> Tensor:
        return argument.new_empty(argument.shape) if argument is not None and needed else a.lse.new_empty(0)

    def coeffs(argument: Tensor | None) -> Tensor:
        return a.lse.new_empty(0 if argument is None else argument.shape)

    return CrossEntropyGradients(
        empty(a.input, a.need_input),
        empty(a.centers, a.need_centers),
        empty(a.displacements, a.need_displacements),
        empty(a.tau, a.need_tau),
        coeffs(a.input_coeffs),
        coeffs(a.class_coeffs),
        empty(a.class_bias, a.need_bias),
        empty(a.margin, a.need_margin),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    save(ctx, CrossEntropyForward(*inputs), CrossEntropy(*output))


def save(ctx: Any, a: CrossEntropyForward, output: CrossEntropy) -> None:
    """Save for `gradients` what the backward takes."""
    ctx.options, ctx.allow_tf32 = a[10:14], a.allow_tf32
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*a[:10], output.lse, *output[3:])


def _backward(
    ops: Any, ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    return gradients(ops.cross_entropy_backward.default, ctx, grad_loss, grad_lse, ctx.needs_input_grad)


def gradients(
    backward: Callable[..., tuple[Tensor, ...]],
    ctx: Any,
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return a gradient or None for each argument of the forward.

    Args:
        backward: takes the fields of `CrossEntropyBackward`.
        ctx: the context that `save` filled.
        grad_loss, grad_lse: gradients of the outputs; None where an output was not used.
        needed: per argument of the forward, True if it needs a gradient.
    """
    if grad_loss is None and grad_lse is None:
        return (None,) * 16
    needs = (*needed[:4], needed[7], needed[9])
    computed = backward(grad_loss, grad_lse, *ctx.saved_tensors, *ctx.options, *needs, ctx.allow_tf32)
    differentiable = (*needed[:6], needed[7], needed[9])
    *others, bias, margin = [g if need else None for g, need in zip(computed, differentiable, strict=True)]
    return *others, None, bias, None, margin, *(None,) * 6


CROSS_ENTROPY_FORWARD = Op(
    "cross_entropy_forward", CrossEntropyForward, CrossEntropy, _forward_fake, _backward, _save, autocast=3
)
CROSS_ENTROPY_BACKWARD = Op(
    "cross_entropy_backward", CrossEntropyBackward, CrossEntropyGradients, _backward_fake, no_double_backward
)
