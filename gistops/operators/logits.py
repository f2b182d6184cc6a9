"""Ops that return logits [B, K] and the slots that attain them: of translations, sub-centers and rotations.

`csrc/schema.cpp` describes the arguments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .registry import Op, compute_dtype, needed_gradients, no_double_backward


class Logits(NamedTuple):
    """Outputs of the forward ops."""

    logits: Tensor
    slots: Tensor
    center_rnorms: Tensor
    input_rnorms: Tensor


class LogitsForward(NamedTuple):
    """Arguments of `logits_forward`."""

    input: Tensor
    centers: Tensor
    displacements: Tensor
    tau: Tensor
    allow_tf32: bool = False
    need_slots: bool = True
    logits_dtype: torch.dtype | None = None


class LogitsBackward(NamedTuple):
    """Arguments of `logits_backward`."""

    grad: Tensor
    input: Tensor
    centers: Tensor
    displacements: Tensor
    tau: Tensor
    logits: Tensor
    slots: Tensor
    center_rnorms: Tensor
    input_rnorms: Tensor
    need_input: bool
    need_centers: bool
    need_displacements: bool
    need_tau: bool
    allow_tf32: bool = False


class LogitsGradients(NamedTuple):
    """Outputs of `logits_backward`."""

    grad_input: Tensor
    grad_centers: Tensor
    grad_displacements: Tensor
    grad_tau: Tensor


class SubcenterForward(NamedTuple):
    """Arguments of `subcenter_forward`."""

    input: Tensor
    centers: Tensor
    tau: Tensor
    allow_tf32: bool = False
    need_slots: bool = True
    logits_dtype: torch.dtype | None = None


class SubcenterBackward(NamedTuple):
    """Arguments of `subcenter_backward`."""

    grad: Tensor
    input: Tensor
    centers: Tensor
    tau: Tensor
    logits: Tensor
    slots: Tensor
    center_rnorms: Tensor
    input_rnorms: Tensor
    need_input: bool
    need_centers: bool
    need_tau: bool
    allow_tf32: bool = False


class SubcenterGradients(NamedTuple):
    """Outputs of `subcenter_backward`."""

    grad_input: Tensor
    grad_centers: Tensor
    grad_tau: Tensor


class RotationForward(NamedTuple):
    """Arguments of `rotation_forward`."""

    input: Tensor
    centers: Tensor
    tau: Tensor
    directions: Tensor
    turns: Tensor
    allow_tf32: bool = False
    need_slots: bool = True
    logits_dtype: torch.dtype | None = None


class RotationBackward(NamedTuple):
    """Arguments of `rotation_backward`."""

    grad: Tensor
    input: Tensor
    centers: Tensor
    tau: Tensor
    directions: Tensor
    turns: Tensor
    logits: Tensor
    slots: Tensor
    center_rnorms: Tensor
    input_rnorms: Tensor
    need_input: bool
    need_centers: bool
    need_tau: bool
    allow_tf32: bool = False


class RotationGradients(NamedTuple):
    """Outputs of `rotation_backward`."""

    grad_input: Tensor
    grad_centers: Tensor
    grad_tau: Tensor
    grad_directions: Tensor
    grad_turns: Tensor


class CenterNorms(NamedTuple):
    """Arguments of `center_norms`."""

    centers: Tensor
    displacements: Tensor


class FrozenLogits(NamedTuple):
    """Arguments of `frozen_logits`."""

    input: Tensor
    centers: Tensor
    displacements: Tensor
    tau: Tensor
    norms: Tensor
    need_slots: bool = True
    logits_dtype: torch.dtype | None = None


class LogitsAndSlots(NamedTuple):
    """Outputs of `frozen_logits`."""

    logits: Tensor
    slots: Tensor


def _logits_fake(a: LogitsForward) -> Logits:
    dtype = compute_dtype(a.input, a.centers, a.displacements)
    return _fake(a, a.displacements.shape[0] + 1, dtype)


def _subcenter_fake(a: SubcenterForward) -> Logits:
    return _fake(a, a.centers.shape[1], compute_dtype(a.input, a.centers))


def _rotation_fake(a: RotationForward) -> Logits:
    return _fake(a, a.directions.shape[0], compute_dtype(a.input, a.centers))


def _fake(a: LogitsForward | SubcenterForward | RotationForward, slots: int, dtype: torch.dtype) -> Logits:
    return Logits(
        *_fake_logits_and_slots(a, dtype),
        a.input.new_empty(slots, a.centers.shape[0], dtype=dtype),
        a.input.new_empty(a.input.shape[0], dtype=dtype),
    )


def _fake_logits_and_slots(
    a: LogitsForward | SubcenterForward | RotationForward | FrozenLogits, dtype: torch.dtype
) -> LogitsAndSlots:
    shape = a.input.shape[0], a.centers.shape[0]
    return LogitsAndSlots(
        a.input.new_empty(shape, dtype=a.logits_dtype or dtype),
        a.input.new_empty(shape if a.need_slots else (0,), dtype=torch.uint8),
    )


def _logits_backward_fake(a: LogitsBackward) -> LogitsGradients:
    return LogitsGradients(
        empty_gradient(a.input, a.need_input),
        empty_gradient(a.centers, a.need_centers),
        empty_gradient(a.displacements, a.need_displacements),
        empty_gradient(a.tau, a.need_tau),
    )


def _subcenter_backward_fake(a: SubcenterBackward) -> SubcenterGradients:
    return SubcenterGradients(
        empty_gradient(a.input, a.need_input),
        empty_gradient(a.centers, a.need_centers),
        empty_gradient(a.tau, a.need_tau),
    )


def _rotation_backward_fake(a: RotationBackward) -> RotationGradients:
    return RotationGradients(
        empty_gradient(a.input, a.need_input),
        empty_gradient(a.centers, a.need_centers),
        empty_gradient(a.tau, a.need_tau),
        a.directions.new_empty(a.directions.shape, dtype=a.center_rnorms.dtype),
        a.turns.new_empty(a.turns.shape, dtype=a.center_rnorms.dtype),
    )


def empty_gradient(argument: Tensor, needed: bool) -> Tensor:
    """Return an uninitialized gradient of an argument, or an empty tensor if it is not needed."""
    return argument.new_empty(argument.shape if needed else (0,))


def _center_norms_fake(a: CenterNorms) -> Tensor:
    slots = a.displacements.shape[0] + 1 if a.centers.dim() == 2 else a.centers.shape[1]
    dtype = compute_dtype(a.centers, a.displacements)
    return a.centers.new_empty(slots, a.centers.shape[0], dtype=dtype)


def _frozen_logits_fake(a: FrozenLogits) -> LogitsAndSlots:
    return _fake_logits_and_slots(a, compute_dtype(a.input, a.centers, a.displacements))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.allow_tf32, ctx.need_slots, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(
    op: Any, tensors: int, optional: int, ctx: Any, grad: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a forward op's tensors, and None for its other arguments.

    Args:
        op: the backward op.
        tensors: number of tensors among the arguments of the forward op; they come first.
        optional: number of leading tensors whose gradient the backward op computes only if asked.

    Raises:
        RuntimeError: the forward was called without slots.
    """
    if grad is None:
        return (None,) * (tensors + 3)
    if not ctx.need_slots:
        raise RuntimeError(
            "need_slots: expected True where a gradient is needed, got False; a graph that was compiled or exported "
            "under torch.no_grad() has no gradient"
        )
    needs = ctx.needs_input_grad[:tensors]
    saved = ctx.saved_tensors  # read once, for torch.utils.checkpoint
    gradients = op.default(grad, *saved, *needs[:optional], ctx.allow_tf32)
    return *needed_gradients(gradients, saved, needs), None, None, None


def _logits_backward(ops: Any, ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return _backward(ops.logits_backward, 4, 4, ctx, grad)


def _subcenter_backward(ops: Any, ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return _backward(ops.subcenter_backward, 3, 3, ctx, grad)


def _rotation_backward(ops: Any, ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return _backward(ops.rotation_backward, 5, 3, ctx, grad)


LOGITS_FORWARD = Op(
    "logits_forward", LogitsForward, Logits, _logits_fake, _logits_backward, _save, autocast=3
)
LOGITS_BACKWARD = Op(
    "logits_backward", LogitsBackward, LogitsGradients, _logits_backward_fake, no_double_backward
)
SUBCENTER_FORWARD = Op(
    "subcenter_forward", SubcenterForward, Logits, _subcenter_fake, _subcenter_backward, _save, autocast=2
)
SUBCENTER_BACKWARD = Op(
    "subcenter_backward", SubcenterBackward, SubcenterGradients, _subcenter_backward_fake, no_double_backward
)
ROTATION_FORWARD = Op(
    "rotation_forward", RotationForward, Logits, _rotation_fake, _rotation_backward, _save, autocast=2
)
ROTATION_BACKWARD = Op(
    "rotation_backward", RotationBackward, RotationGradients, _rotation_backward_fake, no_double_backward
)
CENTER_NORMS = Op("center_norms", CenterNorms, Tensor, _center_norms_fake)
FROZEN_LOGITS = Op("frozen_logits", FrozenLogits, LogitsAndSlots, _frozen_logits_fake)
