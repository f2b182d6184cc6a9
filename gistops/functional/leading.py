"""Any leading dimensions: the ops take rows [B, d]."""

from __future__ import annotations

from torch import Tensor


def rows(input: Tensor) -> Tensor:
    """Return input [..., d] as rows [B, d]."""
    if input.dim() == 2:
        return input
    return input[None] if input.dim() == 1 else input.flatten(0, -2)


def restore(output: Tensor, input: Tensor) -> Tensor:
    """Return output [B, ...] with the leading dimensions of input."""
    return output if input.dim() == 2 else output.reshape((*input.shape[:-1], *output.shape[1:]))
