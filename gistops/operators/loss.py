"""The operators `<family>_lse_forward` and `<family>_lse_backward`, the parts of a cross-entropy without [B, K]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import registry

#: As in csrc/schema.cpp, which says what they mean; a test compares them.
FORWARD_SCHEMA = (
    "(Tensor input, Tensor centers, Tensor displacements, Tensor tau, Tensor? class_bias,"
    " Tensor? feature_table, Tensor? class_tables, Tensor target, Tensor? weight, int ignore_index,"
    " bool allow_tf32=False) -> (Tensor lse, Tensor target_logits, Tensor sums)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_lse, Tensor grad_target, Tensor grad_sums, Tensor input, Tensor centers,"
    " Tensor displacements, Tensor tau, Tensor? class_bias, Tensor? feature_table, Tensor? class_tables,"
    " Tensor target, Tensor? weight, int ignore_index, Tensor lse, bool need_input, bool need_centers,"
    " bool need_displacements, bool need_tau, bool need_bias, bool allow_tf32=False)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def complete(family: str) -> None:
    """Add fake kernels, autograd and autocast to the operators of a family that has been defined."""
    forward, backward = f"gistops::{family}_lse_forward", f"gistops::{family}_lse_backward"
    torch.library.register_fake(forward, _forward_fake)
    torch.library.register_fake(backward, _backward_fake)
    torch.library.register_autograd(forward, _backward_of(family), setup_context=_save)
    torch.library.register_autograd(backward, registry.double_backward)
    registry.autocast(f"{family}_lse_forward")


def _forward_fake(
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor,
    class_bias: Tensor | None,
    feature_table: Tensor | None,
    class_tables: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = registry.compute_dtype(input, centers, displacements)
    batch = input.shape[0]
    return (
        input.new_empty(batch, dtype=dtype),
        input.new_empty(batch, dtype=dtype),
        input.new_empty(0 if weight is None else batch, dtype=dtype),
    )


def _backward_fake(
    grad_lse: Tensor,
    grad_target: Tensor,
    grad_sums: Tensor,
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor,
    class_bias: Tensor | None,
    feature_table: Tensor | None,
    class_tables: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    lse: Tensor,
    need_input: bool,
    need_centers: bool,
    need_displacements: bool,
    need_tau: bool,
    need_bias: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor, ...]:
    arguments = (input, centers, displacements, tau, class_bias, feature_table, class_tables)
    needs = (need_input, need_centers, need_displacements, need_tau, need_bias, True, True)
    return tuple(
        lse.new_empty(0)
        if x is None
        else x.new_empty(x.shape if needed else (0,), dtype=lse.dtype if i > 4 else x.dtype)
        for i, (x, needed) in enumerate(zip(arguments, needs, strict=True))
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.ignore_index, ctx.allow_tf32 = inputs
    ctx.save_for_backward(*tensors, output[0])


def _backward_of(family: str) -> Callable[..., tuple[Tensor | None, ...]]:
    operator = getattr(torch.ops.gistops, f"{family}_lse_backward").default

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[:7]
        gradients = operator(*grads, *tensors, ctx.ignore_index, lse, *needs[:5], ctx.allow_tf32)
        return *_chosen(gradients, tensors, needs), None, None, None, None

    return backward


class ParkedLse(torch.autograd.Function):
    """`constellation_lse_forward` on the CPU with the scores parked where the gradient of the centres will lie.

    So the backward makes no product again. It takes the memory from the forward on, and can use it once: another
    backward of the same graph makes the scores again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        centers: Tensor,
        displacements: Tensor,
        tau: Tensor,
        class_bias: Tensor | None,
        feature_table: Tensor | None,
        class_tables: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        parked = torch.empty_like(centers, memory_format=torch.contiguous_format)
        arguments = (
            input,
            centers,
            displacements,
            tau,
            class_bias,
            feature_table,
            class_tables,
            target,
            weight,
        )
        output = torch.ops.gistops.constellation_parked_lse_forward.default(*arguments, ignore_index, parked)
        ctx.save_for_backward(*arguments, output[0])
        ctx.ignore_index = ignore_index
        ctx.parked = [parked]
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, lse = ctx.saved_tensors
        arguments = (*(g.contiguous() for g in grads), *tensors, ctx.ignore_index, lse)
        needs = ctx.needs_input_grad[:7]
        operators = torch.ops.gistops
        parked = ctx.parked.pop() if ctx.parked else None
        if parked is not None and needs[1] and not torch.is_grad_enabled():
            gradients = operators.constellation_parked_lse_backward.default(
                *arguments, needs[0], *needs[2:5], parked
            )
            gradients = (gradients[0], parked, *gradients[1:])
        else:  # this one knows what to say of second derivatives
            gradients = operators.constellation_lse_backward.default(*arguments, *needs[:5])
        return *_chosen(gradients, tensors, needs), None, None, None


def _chosen(
    gradients: tuple[Tensor, ...], arguments: list[Tensor], needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients asked for, in their arguments' dtypes."""
    return [
        g.to(x.dtype) if needed else None for g, x, needed in zip(gradients, arguments, needs, strict=False)
    ]


def parks(*tensors: Tensor | None) -> bool:
    """Whether `ParkedLse` may serve: plain CPU tensors, in eager mode, and the centres (second) need a gradient."""
    if torch.compiler.is_compiling():
        return False
    centers = tensors[1]
    return (
        torch.is_grad_enabled()
        and centers is not None
        and centers.requires_grad
        and all(t is None or (type(t) in _PLAIN and t.device.type == "cpu") for t in tensors)
    )


_PLAIN = (Tensor, torch.nn.Parameter)
