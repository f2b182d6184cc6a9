"""In-place changes, between forward and backward, of tensors that a loss converts or indexes before anything saves them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._functorch import transforms_active, unsupported_transform


def detect_changes(x: Tensor, *tensors: Tensor | float | None) -> Tensor:
    """Return x. Its backward raises if one of the tensors has been changed in-place, as if x had been computed from them.

    x must not be an output: in-place changes of a view from an autograd function are not allowed. Graphs of torch.compile
    and transforms of torch.func save what they need by themselves.
    """
    watched = [t for t in tensors if isinstance(t, Tensor)]
    if not (watched and x.requires_grad) or torch.compiler.is_compiling():
        return x
    if transforms_active() or unsupported_transform():
        return x
    result: Tensor = _Saved.apply(x, *watched)  # type: ignore[no-untyped-call]
    return result


class _Saved(torch.autograd.Function):
    """The identity of its first argument. The other arguments are saved and their version counters compared."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *(None for _ in ctx.saved_tensors)
