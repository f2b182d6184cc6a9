"""The loss of translations, sub-centers and rotations on the CPU as one node of the autograd graph.

Autograd's nodes for the dozen small tensors between the parts of a loss and the loss take longer than a small training
step. This serves eager mode without class bias, margin and label smoothing; `row_loss.py` serves the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._classifier import Classifier, LossOptions
from ..backends.cpu_stash import can_stash, in_autocast_dtype, new_stash, parts_backward
from ..operators.cross_entropy import REDUCTIONS
from .transforms import rotation


def serves(backend: str, input: Tensor, classifier: Classifier, target: Tensor, options: LossOptions) -> bool:
    """Return True if `stashed_loss` computes this loss."""
    return (
        backend == "cpu"
        and classifier.transform != "mlp"
        and options.class_bias is None
        and options.margin is None
        and options.label_smoothing == 0
        and can_stash(classifier.centers, input, *classifier[1:3], classifier.axis, target, options.weight)
    )


def stashed_loss(
    input: Tensor, classifier: Classifier, target: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """Return the loss and the log-sum-exp [B] of rows [B, d]; differentiable once."""
    watched = (classifier.displacements, classifier.axis) if classifier.transform == "rotation" else ()
    input, centers, displacements, *turns = rotation.operands(input, classifier, "cpu")
    vectors = in_autocast_dtype(input, centers, displacements)
    tensors = (*vectors, classifier.tau, None, *turns, target, options.weight)
    outputs: tuple[Tensor, Tensor]
    outputs = _StashedLoss.apply(  # type: ignore[no-untyped-call]
        *tensors, REDUCTIONS[options.reduction], options.ignore_index, watched
    )
    return outputs


class _StashedLoss(torch.autograd.Function):
    """The loss and lse; takes tensors in the order of `PartsForward`.

    Those in `watched` are not used; the backward raises if one of them has been changed in-place.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, target, weight, ctx.reduction, ctx.ignore_index, watched = arguments
        stash = new_stash(ctx, tensors[1])
        loss, lse, lse_others, *slopes = torch.ops.gistops.stashed_cross_entropy_forward.default(
            *tensors[:4], *tensors[5:7], target, weight, ctx.reduction, ctx.ignore_index, stash
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, target, weight, lse_others, *slopes, *watched)
        return loss, lse

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, _, lse_others, loss_slopes, lse_slopes = ctx.saved_tensors[:12]
        target = tensors[-1]
        grads = None  # of lse_others and of the targets' logits, [2, B]
        if grad_loss is not None:
            grads = grad_loss * loss_slopes
            if ctx.reduction == REDUCTIONS["none"]:  # the gradient of an ignored row may be infinite
                grads = torch.where(target == ctx.ignore_index, 0, grads)
        if grad_lse is not None:
            by_lse = grad_lse * lse_slopes
            grads = by_lse if grads is None else grads + by_lse
        if grads is None:
            return (None,) * 12
        parts = (*grads, lse_others.new_empty(0))
        return *parts_backward(ctx, parts, [*tensors, None], lse_others), *(None,) * 5
