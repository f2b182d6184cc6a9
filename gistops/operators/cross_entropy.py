"""The operators `<family>_cross_entropy_forward` and `_backward`: the whole loss, for families with kernels for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import registry

#: `keep`: scores [B, K] and slots [B, K] are returned for the backward; otherwise they are empty. `rows` and `scalars`
#: are the forward's notes for the backward. lse has bias and margin in it.
FORWARD_SCHEMA = (
    "(Tensor input, Tensor centers, Tensor displacements, Tensor tau, Tensor? class_bias, Tensor target,"
    " Tensor? weight, Tensor? margin, str margin_kind, str reduction, int ignore_index, float label_smoothing,"
    " bool keep, bool allow_tf32=False) -> (Tensor loss, Tensor lse, Tensor scores, Tensor slots,"
    " Tensor center_rnorms, Tensor input_rnorms, Tensor rows, Tensor scalars)"
)
BACKWARD_SCHEMA = (
    "(Tensor? grad_loss, Tensor? grad_lse, Tensor input, Tensor centers, Tensor displacements, Tensor tau,"
    " Tensor? class_bias, Tensor target, Tensor? weight, Tensor? margin, Tensor scores, Tensor slots,"
    " Tensor center_rnorms, Tensor input_rnorms, Tensor rows, Tensor scalars, str reduction, int ignore_index,"
    " float label_smoothing, bool need_input, bool need_centers, bool need_displacements, bool need_tau,"
    " bool need_bias, bool need_margin, bool allow_tf32=False)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
#: Memory that scores and slots may take from the forward to the backward. A constant: to ask the device how much is
#: free would make the answer depend on what else runs.
HELD_BYTES = 2 << 30


def define(
    family: str, forward: Callable[..., Any], backward: Callable[..., Any], devices: Sequence[str]
) -> None:
    """Make the operators of a family from Python kernels, with fake kernels, autograd and autocast."""
    names = f"{family}_cross_entropy_forward", f"{family}_cross_entropy_backward"
    registry.define(names[0], FORWARD_SCHEMA, forward, devices)
    registry.define(names[1], BACKWARD_SCHEMA, backward, devices)
    torch.library.register_fake(f"gistops::{names[0]}", _forward_fake)
    torch.library.register_fake(f"gistops::{names[1]}", _backward_fake)
    torch.library.register_autograd(f"gistops::{names[0]}", _backward_of(family), setup_context=_save)
    torch.library.register_autograd(f"gistops::{names[1]}", registry.double_backward)
    registry.autocast(names[0])


def keeps(*leaves: Tensor | None, classes: int, itemsize: int) -> bool:
    """Whether the scores of such a call, whose first argument is the input, are held for the backward."""
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in leaves):
        return False
    assert leaves[0] is not None
    return leaves[0].shape[0] * classes * (itemsize + 1) <= HELD_BYTES


def _forward_fake(
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor,
    class_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    margin: Tensor | None,
    margin_kind: str,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    keep: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor, ...]:
    dtype = registry.compute_dtype(input, centers, displacements)
    B, K = input.shape[0], centers.shape[0]
    held = (B, K) if keep else (0, 0)
    return (
        input.new_empty((B,) if reduction == "none" else (), dtype=dtype),
        input.new_empty(B, dtype=dtype),
        input.new_empty(held, dtype=dtype),
        input.new_empty(held, dtype=torch.uint8),
        input.new_empty(displacements.shape[0] + 1, K, dtype=dtype),
        input.new_empty(B, dtype=dtype),
        input.new_empty(2 if margin is None else 5, B, dtype=dtype),
        input.new_empty(2, dtype=dtype),
    )


def _backward_fake(
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor,
    class_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    margin: Tensor | None,
    scores: Tensor,
    slots: Tensor,
    center_rnorms: Tensor,
    input_rnorms: Tensor,
    rows: Tensor,
    scalars: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    need_input: bool,
    need_centers: bool,
    need_displacements: bool,
    need_tau: bool,
    need_bias: bool,
    need_margin: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor, ...]:
    arguments = (input, centers, displacements, tau, class_bias, margin)
    needs = (need_input, need_centers, need_displacements, need_tau, need_bias, need_margin)
    return tuple(
        x.new_empty(x.shape) if x is not None and needed else scalars.new_empty(0)
        for x, needed in zip(arguments, needs, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors = inputs[:8]
    _, ctx.reduction, ctx.ignore_index, ctx.label_smoothing, _, ctx.allow_tf32 = inputs[8:]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[2:])


def _backward_of(family: str) -> Callable[..., tuple[Tensor | None, ...]]:
    operator = getattr(torch.ops.gistops, f"{family}_cross_entropy_backward").default

    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        needs = (*needed[:5], needed[7])
        if grad_loss is None and grad_lse is None:
            return (None,) * 14
        options = (ctx.reduction, ctx.ignore_index, ctx.label_smoothing)
        made = operator(grad_loss, grad_lse, *ctx.saved_tensors, *options, *needs, ctx.allow_tf32)
        of = [g if need else None for g, need in zip(made, needs, strict=True)]
        return *of[:5], None, None, of[5], *(None,) * 6

    return backward
