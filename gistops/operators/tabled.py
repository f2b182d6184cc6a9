"""The operators `tabled_forward` and `tabled_backward`: logits of vectors by tables, such as rotated centres."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import registry

#: As in csrc/schema.cpp, which says what they mean; a test compares them.
FORWARD_SCHEMA = (
    "(Tensor input, Tensor centers, Tensor tau, Tensor feature_table, Tensor class_tables,"
    " bool allow_tf32=False)"
    " -> (Tensor logits, Tensor slots, Tensor center_rnorms, Tensor input_rnorms)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor input, Tensor centers, Tensor tau, Tensor feature_table,"
    " Tensor class_tables, Tensor logits, Tensor slots, Tensor center_rnorms, Tensor input_rnorms,"
    " bool need_input, bool need_centers, bool need_tau, bool allow_tf32=False)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def complete(prefix: str) -> None:
    """Add fake kernels and autograd to `<prefix>tabled_forward` and `_backward`, which have been defined."""
    forward, backward = f"gistops::{prefix}tabled_forward", f"gistops::{prefix}tabled_backward"
    torch.library.register_fake(forward, _forward_fake)
    torch.library.register_fake(backward, _backward_fake)
    torch.library.register_autograd(forward, _backward_of(prefix), setup_context=_save)
    torch.library.register_autograd(backward, registry.double_backward)
    registry.autocast(f"{prefix}tabled_forward", operands=2)


def _forward_fake(
    input: Tensor,
    centers: Tensor,
    tau: Tensor,
    feature_table: Tensor,
    class_tables: Tensor,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = registry.compute_dtype(input, centers)
    batch, classes = input.shape[0], centers.shape[0]
    return (
        input.new_empty(batch, classes, dtype=dtype),
        input.new_empty(batch, classes, dtype=torch.uint8),
        input.new_empty(feature_table.shape[1], classes, dtype=dtype),
        input.new_empty(batch, dtype=dtype),
    )


def _backward_fake(
    grad: Tensor,
    input: Tensor,
    centers: Tensor,
    tau: Tensor,
    feature_table: Tensor,
    class_tables: Tensor,
    logits: Tensor,
    slots: Tensor,
    center_rnorms: Tensor,
    input_rnorms: Tensor,
    need_input: bool,
    need_centers: bool,
    need_tau: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor, ...]:
    arguments = (input, centers, tau, feature_table, class_tables)
    needs = (need_input, need_centers, need_tau, True, True)
    return tuple(
        x.new_empty(x.shape if needed else (0,), dtype=logits.dtype if i > 2 else x.dtype)
        for i, (x, needed) in enumerate(zip(arguments, needs, strict=True))
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.allow_tf32 = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward_of(prefix: str) -> Callable[..., tuple[Tensor | None, ...]]:
    operator = getattr(torch.ops.gistops, f"{prefix}tabled_backward").default

    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None, None
        needs = ctx.needs_input_grad[:5]
        gradients = operator(grad, *ctx.saved_tensors, *needs[:3], ctx.allow_tf32)
        dtypes = (x.dtype for x in ctx.saved_tensors[:5])
        return *(
            g.to(dtype) if needed else None for g, needed, dtype in zip(gradients, needs, dtypes, strict=True)
        ), None

    return backward
