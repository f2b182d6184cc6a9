"""The ops `cross_entropy_parts_forward` and `_backward`: sums over classes that make a loss, without logits [B, K].

`csrc/schema.cpp` describes the arguments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .registry import Op, SymInt, compute_dtype, needed_gradients, no_double_backward


class PartsForward(NamedTuple):
    """Arguments of `cross_entropy_parts_forward`."""

    input: Tensor
    centers: Tensor
    displacements: Tensor
    tau: Tensor
    class_bias: Tensor | None
    directions: Tensor | None
    turns: Tensor | None
    target: Tensor
    weight: Tensor | None
    ignore_index: SymInt
    allow_tf32: bool = False


class Parts(NamedTuple):
    """Outputs of `cross_entropy_parts_forward`."""

    lse_others: Tensor
    target_logits: Tensor
    weighted_sums: Tensor


class PartsBackward(NamedTuple):
    """Arguments of `cross_entropy_parts_backward`."""

    grad_lse_others: Tensor
    grad_target_logits: Tensor
    grad_weighted_sums: Tensor
    input: Tensor
    centers: Tensor
    displacements: Tensor
    tau: Tensor
    class_bias: Tensor | None
    directions: Tensor | None
    turns: Tensor | None
    target: Tensor
    weight: Tensor | None
    ignore_index: SymInt
    lse_others: Tensor
    need_input: bool
    need_centers: bool
    need_displacements: bool
    need_tau: bool
    need_bias: bool
    allow_tf32: bool = False


class PartsGradients(NamedTuple):
    """Outputs of `cross_entropy_parts_backward`."""

    grad_input: Tensor
    grad_centers: Tensor
    grad_displacements: Tensor
    grad_tau: Tensor
    grad_class_bias: Tensor
    grad_directions: Tensor
    grad_turns: Tensor


def _forward_fake(a: PartsForward) -> Parts:
    dtype = compute_dtype(a.input, a.centers, a.displacements)
    batch = a.input.shape[0]
    return Parts(
        a.input.new_empty(batch, dtype=dtype),
        a.input.new_empty(batch, dtype=dtype),
        a.input.new_empty(0 if a.weight is None else batch, dtype=dtype),
    )


def _backward_fake(a: PartsBackward) -> PartsGradients:
    sums = a.lse_others.dtype

    def empty(argument: Tensor | None, needed: bool, computed: bool = False) -> Tensor:
        if argument is None:
            return a.lse_others.new_empty(0)
        return argument.new_empty(
            argument.shape if needed else (0,), dtype=sums if computed else argument.dtype
        )

    return PartsGradients(
        empty(a.input, a.need_input),
        empty(a.centers, a.need_centers),
        empty(a.displacements, a.need_displacements),
        empty(a.tau, a.need_tau),
        empty(a.class_bias, a.need_bias),
        empty(a.directions, True, computed=True),
        empty(a.turns, True, computed=True),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.ignore_index, ctx.allow_tf32 = inputs
    ctx.save_for_backward(*tensors, output[0])


def _backward(ops: Any, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, lse_others = ctx.saved_tensors
    needs = ctx.needs_input_grad[:7]
    gradients = ops.cross_entropy_parts_backward.default(
        *grads, *tensors, ctx.ignore_index, lse_others, *needs[:5], ctx.allow_tf32
    )
    return *needed_gradients(gradients, tensors, needs), None, None, None, None


CROSS_ENTROPY_PARTS_FORWARD = Op(
    "cross_entropy_parts_forward", PartsForward, Parts, _forward_fake, _backward, _save, autocast=3
)
CROSS_ENTROPY_PARTS_BACKWARD = Op(
    "cross_entropy_parts_backward", PartsBackward, PartsGradients, _backward_fake, no_double_backward
)
