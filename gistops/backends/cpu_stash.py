"""The parts of a cross-entropy on the CPU, with scores stored in the buffer that later holds grad_centers.

This saves the backward one matrix product. The buffer is held from the forward on and can be used once; a second backward
of the same graph recomputes the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._functorch import is_wrapped, transforms_active
from ..operators.registry import cast_operands, needed_gradients

_PLAIN = (Tensor, torch.nn.Parameter)


def can_stash(centers: Tensor, *others: Tensor | None) -> bool:
    """Return True for plain CPU tensors in eager mode, if the centers need a gradient."""
    return torch.is_grad_enabled() and centers.requires_grad and is_eager(centers, *others)


def is_eager(*tensors: Tensor | None) -> bool:
    """Return True for plain CPU tensors in eager mode, outside transforms of `torch.func`."""
    return (
        not torch.compiler.is_compiling()
        and not transforms_active()
        and all(t is None or (type(t) in _PLAIN and t.device.type == "cpu") for t in tensors)
    )


class StashedCrossEntropyParts(torch.autograd.Function):
    """`cross_entropy_parts_forward` with a stash; takes the fields of `PartsForward` except allow_tf32."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, ctx.ignore_index = arguments
        stash = new_stash(ctx, tensors[1])
        output = torch.ops.gistops.stashed_cross_entropy_parts_forward.default(*arguments, stash)
        ctx.save_for_backward(*tensors, output[0])
        return output[0], output[1], output[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, lse_others = ctx.saved_tensors
        grads = tuple(g.contiguous() for g in grads)
        return *parts_backward(ctx, grads, tensors, lse_others), None, None, None


def in_autocast_dtype(*operands: Tensor) -> Sequence[Tensor]:
    """Return input, centers and displacements as autocast wants them: the functions here call their ops below autocast."""
    if torch.is_autocast_enabled("cpu"):
        return cast_operands(torch.ops.gistops, "cpu", operands)
    return operands


def new_stash(ctx: Any, centers: Tensor) -> Tensor:
    """Return the buffer for the gradient of centers, which ctx keeps for `parts_backward`."""
    stash = torch.empty_like(centers, memory_format=torch.contiguous_format)
    ctx.stash = [stash]
    return stash


def parts_backward(
    ctx: Any, grads: tuple[Tensor, ...], tensors: list[Any], lse_others: Tensor
) -> list[Tensor | None]:
    """Return the gradients of the tensors from input to turns; None for those that need none.

    Args:
        ctx: a context with ignore_index and `new_stash`, of a function that takes the fields of `PartsForward` first.
        grads: gradients of the fields of `Parts`, contiguous.
        tensors: all tensors among the fields of `PartsForward`.
        lse_others: from the forward.
    """
    needs, ops = ctx.needs_input_grad[:7], torch.ops.gistops
    arguments = (*grads, *tensors, ctx.ignore_index, lse_others)
    # A vmap over the gradients, as by is_grads_batched, calls the op once per gradient and leaves the stash.
    stash = ctx.stash.pop() if ctx.stash and not is_wrapped(*grads) else None
    if stash is not None and needs[1] and not torch.is_grad_enabled():
        gradients = ops.stashed_cross_entropy_parts_backward.default(*arguments, needs[0], *needs[2:5], stash)
        gradients = (gradients[0], stash, *gradients[1:])
    else:  # the op raises the error for second derivatives
        gradients = ops.cross_entropy_parts_backward.default(*arguments, *needs[:5])
    return needed_gradients(gradients, tensors, needs)
