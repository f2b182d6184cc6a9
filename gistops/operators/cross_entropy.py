"""The operators `<family>_cross_entropy_forward` and `_backward`: the whole loss, for families with kernels for it.

Eager mode does not go through them, but through a `torch.autograd.Function` over the same kernels: the dispatcher's
layers in Python take longer than a small step. Graphs (torch.compile, export) hold the operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import registry

#: As in csrc/schema.cpp. margin_kind: 0 logit, 1 cosine, 2 angle; reduction: 0 none, 1 mean, 2 sum. margin has one
#: element or K. ldB is B rounded up to a multiple of 16. `keep`: scores [K, ldB] and slots [K, ldB], class by class, are
#: returned for the backward, columns from B on undefined; otherwise they are empty, and the backward makes them again.
#: lse has bias and margin in it. inside: one element, whether all targets are in range. rows [n, B] and scalars [2] are
#: the forward's notes for the backward.
FORWARD_SCHEMA = (
    "(Tensor input, Tensor centers, Tensor displacements, Tensor tau, Tensor target, Tensor? class_bias,"
    " Tensor? weight, Tensor? margin, int margin_kind, int reduction, int ignore_index, float label_smoothing,"
    " bool keep, bool allow_tf32=False) -> (Tensor loss, Tensor lse, Tensor inside, Tensor scores, Tensor slots,"
    " Tensor center_rnorms, Tensor input_rnorms, Tensor rows, Tensor scalars)"
)
BACKWARD_SCHEMA = (
    "(Tensor? grad_loss, Tensor? grad_lse, Tensor input, Tensor centers, Tensor displacements, Tensor tau,"
    " Tensor target, Tensor? class_bias, Tensor? weight, Tensor? margin, Tensor lse, Tensor scores, Tensor slots,"
    " Tensor center_rnorms, Tensor input_rnorms, Tensor rows, Tensor scalars, int margin_kind, int reduction,"
    " int ignore_index, float label_smoothing, bool need_input, bool need_centers, bool need_displacements,"
    " bool need_tau, bool need_bias, bool need_margin, bool allow_tf32=False)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
MARGIN_KINDS = {"logit": 0, "cosine": 1, "angle": 2}
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
#: Memory that scores and slots may take from the forward to the backward. A constant: to ask the device how much is
#: free would make the answer depend on what else runs.
HELD_BYTES = 2 << 30
Kernel = Callable[..., tuple[Tensor, ...]]
#: The kernels of families that have them in Python; others are called through their operators.
_kernels: dict[str, tuple[Kernel, Kernel]] = {}
#: The families that have these operators.
families: set[str] = set()
_PLAIN = (Tensor, torch.nn.Parameter)


def define(family: str, forward: Kernel, backward: Kernel, devices: Sequence[str]) -> None:
    """Make the operators of a family from Python kernels, and complete them."""
    registry.define(f"{family}_cross_entropy_forward", FORWARD_SCHEMA, forward, devices)
    registry.define(f"{family}_cross_entropy_backward", BACKWARD_SCHEMA, backward, devices)
    _kernels[family] = forward, backward
    complete(family)


def complete(family: str) -> None:
    """Add fake kernels, autograd and autocast to the operators of a family that has been defined."""
    forward, backward = (f"gistops::{family}_cross_entropy_{which}" for which in ("forward", "backward"))
    torch.library.register_fake(forward, _forward_fake)
    torch.library.register_fake(backward, _backward_fake)
    torch.library.register_autograd(forward, _backward_of(family), setup_context=_save)
    torch.library.register_autograd(backward, registry.double_backward)
    registry.autocast(f"{family}_cross_entropy_forward")
    families.add(family)


def cross_entropy(
    family: str,
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor,
    target: Tensor,
    class_bias: Tensor | None,
    weight: Tensor | None,
    margin: Tensor | None,
    margin_kind: str,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, lse and inside (`FORWARD_SCHEMA`), differentiable once."""
    tensors: tuple[Tensor | None, ...]
    tensors = (input, centers, displacements, tau, target, class_bias, weight, margin)
    graph = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    itemsize = registry.compute_dtype(input, centers, displacements).itemsize
    keep = graph and input.shape[0] * centers.shape[0] * (itemsize + 1) <= HELD_BYTES
    options = (
        MARGIN_KINDS[margin_kind], REDUCTIONS[reduction], ignore_index, label_smoothing, keep, allow_tf32
    )  # fmt: skip
    made: tuple[Tensor, ...]
    plain = not input.is_meta and all(x is None or type(x) in _PLAIN for x in tensors)
    if torch.compiler.is_compiling() or not plain:
        operator = getattr(torch.ops.gistops, f"{family}_cross_entropy_forward").default
        made = operator(*tensors, *options)
        return made[0], made[1], made[2]
    device = input.device.type
    if device == "cuda" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        cast = (x if x.dtype == torch.float64 else x.to(dtype) for x in (input, centers, displacements))
        tensors = (*cast, *tensors[3:])
    if not graph:
        made = _kernel(family, 0, *tensors, *options)
        return made[0], made[1], made[2]
    made = CrossEntropy.apply(family, *tensors, *options)  # type: ignore[no-untyped-call]
    return made[0], made[1], made[2]


class CrossEntropy(torch.autograd.Function):
    """The operators' kernels in eager mode."""

    @staticmethod
    def forward(ctx: Any, family: str, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _kernel(family, 0, *inputs)
        ctx.family = family
        _save(ctx, inputs, output, output[2:3])
        return output[0], output[1], output[2]

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        needs = (*needed[1:5], needed[6], needed[8])
        if torch.is_grad_enabled():  # the operator knows what to say of second derivatives
            operator = getattr(torch.ops.gistops, f"{ctx.family}_cross_entropy_backward").default
            return None, *_gradients(operator, ctx, grad_loss, grad_lse, needs)

        def kernel(*arguments: Any) -> tuple[Tensor, ...]:
            return _kernel(ctx.family, 1, *arguments)

        return None, *_gradients(kernel, ctx, grad_loss, grad_lse, needs)


def _kernel(family: str, which: int, *arguments: Any) -> tuple[Tensor, ...]:
    """The forward (0) or backward (1) kernel itself, or the operator without the layers above it."""
    if family in _kernels:
        return _kernels[family][which](*arguments)
    operator = getattr(torch.ops.gistops, f"{family}_cross_entropy_{('forward', 'backward')[which]}").default
    with torch._C._AutoDispatchBelowAutograd():
        made: tuple[Tensor, ...] = operator(*arguments)
    return made


def _save(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...], fixed: tuple[Tensor, ...] | None = None
) -> None:
    ctx.options, ctx.allow_tf32 = inputs[8:12], inputs[13]
    ctx.mark_non_differentiable(*(output[2:] if fixed is None else fixed))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:8], output[1], *output[3:])


def _backward_of(family: str) -> Callable[..., tuple[Tensor | None, ...]]:
    operator = getattr(torch.ops.gistops, f"{family}_cross_entropy_backward").default

    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        return _gradients(operator, ctx, grad_loss, grad_lse, (*needed[:4], needed[5], needed[7]))

    return backward


def _gradients(
    kernel: Callable[..., tuple[Tensor, ...]],
    ctx: Any,
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Of the forward's arguments."""
    if grad_loss is None and grad_lse is None:
        return (None,) * 14
    made = kernel(grad_loss, grad_lse, *ctx.saved_tensors, *ctx.options, *needs, ctx.allow_tf32)
    of = [g if need else None for g, need in zip(made, needs, strict=True)]
    return *of[:4], None, of[4], None, of[5], *(None,) * 6


def _forward_fake(
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor,
    target: Tensor,
    class_bias: Tensor | None,
    weight: Tensor | None,
    margin: Tensor | None,
    margin_kind: int,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    keep: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor, ...]:
    dtype = registry.compute_dtype(input, centers, displacements)
    B, K = input.shape[0], centers.shape[0]
    held = (K, padded(B)) if keep else (0, 0)
    return (
        input.new_empty((B,) if reduction == 0 else (), dtype=dtype),
        input.new_empty(B, dtype=dtype),
        input.new_empty(1, dtype=torch.bool),
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
    target: Tensor,
    class_bias: Tensor | None,
    weight: Tensor | None,
    margin: Tensor | None,
    lse: Tensor,
    scores: Tensor,
    slots: Tensor,
    center_rnorms: Tensor,
    input_rnorms: Tensor,
    rows: Tensor,
    scalars: Tensor,
    margin_kind: int,
    reduction: int,
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
        x.new_empty(x.shape) if x is not None and needed else lse.new_empty(0)
        for x, needed in zip(arguments, needs, strict=True)
    )


def padded(features: int) -> int:
    """ldB: what a row of class-major scores takes."""
    return -(-features // 16) * 16
