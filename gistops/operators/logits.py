"""The operators `<family>_forward` and `<family>_backward`, which make and take logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import registry

#: As in csrc/schema.cpp, which has the shapes; a test compares them.
FORWARD_SCHEMA = (
    "(Tensor input, Tensor centers, Tensor displacements, Tensor tau, bool allow_tf32=False)"
    " -> (Tensor logits, Tensor slots, Tensor center_rnorms, Tensor input_rnorms)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor input, Tensor centers, Tensor displacements, Tensor tau,"
    " Tensor logits, Tensor slots, Tensor center_rnorms, Tensor input_rnorms,"
    " bool need_input, bool need_centers, bool need_displacements, bool need_tau,"
    " bool allow_tf32=False)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
Kernel = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def define(family: str, forward: Kernel, backward: Kernel, devices: Sequence[str]) -> None:
    """Make the operators of a family from Python kernels, and complete them.

    Args:
        family: the operators' name.
        forward: takes and returns what `FORWARD_SCHEMA` says.
        backward: takes and returns what `BACKWARD_SCHEMA` says; an empty tensor for each gradient not needed.
        devices: dispatch keys that the kernels serve: "CUDA", "CPU".
    """
    registry.define(f"{family}_forward", FORWARD_SCHEMA, forward, devices)
    registry.define(f"{family}_backward", BACKWARD_SCHEMA, backward, devices)
    complete(family)


def complete(family: str) -> None:
    """Add fake kernels, autograd and autocast to the operators of a family that has been defined."""
    forward, backward = f"gistops::{family}_forward", f"gistops::{family}_backward"
    torch.library.register_fake(forward, _forward_fake)
    torch.library.register_fake(backward, _backward_fake)
    torch.library.register_autograd(forward, _backward_of(family), setup_context=_save)
    torch.library.register_autograd(backward, registry.double_backward)
    registry.autocast(f"{family}_forward")


def _forward_fake(
    input: Tensor, centers: Tensor, displacements: Tensor, tau: Tensor, allow_tf32: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, classes = input.shape[0], centers.shape[0]
    slots = displacements.shape[0] + 1 if centers.dim() == 2 else centers.shape[1]
    dtype = registry.compute_dtype(input, centers, displacements)
    return (
        input.new_empty(batch, classes, dtype=dtype),
        input.new_empty(batch, classes, dtype=torch.uint8),
        input.new_empty(slots, classes, dtype=dtype),
        input.new_empty(batch, dtype=dtype),
    )


def _backward_fake(
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
) -> tuple[Tensor, ...]:
    arguments = (input, centers, displacements, tau)
    needs = (need_input, need_centers, need_displacements, need_tau)
    return tuple(x.new_empty(x.shape if needed else (0,)) for x, needed in zip(arguments, needs, strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.allow_tf32 = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward_of(family: str) -> Callable[..., tuple[Tensor | None, ...]]:
    operator = getattr(torch.ops.gistops, f"{family}_backward").default

    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        needs = ctx.needs_input_grad[:4]
        gradients = operator(grad, *ctx.saved_tensors, *needs, ctx.allow_tf32)
        return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), None

    return backward
