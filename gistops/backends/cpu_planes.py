"""The directions and turns of rotations on the CPU, by one op where PyTorch takes fifty, which cost as much as a small loss.

`functional/transforms/rotation.py` defines them, and computes them elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .cpu_stash import is_eager


def serves(displacements: Tensor, axis: Tensor) -> bool:
    """Return True for plain CPU tensors in eager mode."""
    return is_eager(displacements, axis)


def directions_and_turns(displacements: Tensor, axis: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return directions [M, d] and turns [3, M - 1]; differentiable once."""
    made: tuple[Tensor, Tensor]
    if torch.is_grad_enabled() and (displacements.requires_grad or axis.requires_grad):
        made = _Planes.apply(displacements, axis, dtype)  # type: ignore[no-untyped-call]
    else:
        made = torch.ops.gistops.rotation_planes.default(displacements, axis, dtype)
    return made


class _Planes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, displacements: Tensor, axis: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(displacements, axis)
        directions, turns = torch.ops.gistops.rotation_planes.default(displacements, axis, dtype)
        return directions, turns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_directions: Tensor, grad_turns: Tensor) -> tuple[Tensor | None, ...]:
        operator = torch.ops.gistops.rotation_planes_backward.default
        displacements, axis = ctx.saved_tensors
        grads = operator(grad_directions, grad_turns, displacements, axis)
        return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)), None
