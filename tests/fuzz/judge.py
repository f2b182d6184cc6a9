"""The comparison of a result with the definition, within bounds that follow from the conditioning of the case."""

from __future__ import annotations

import torch
from torch import Tensor

#: How many times the deviation under a disturbance by one rounding per value an error may be.
FACTOR = 32.0


def compute_eps(*dtypes: torch.dtype) -> float:
    """Return the rounding of the logits' dtype."""
    return torch.finfo(torch.float64 if torch.float64 in dtypes else torch.float32).eps


def bound(
    truth: Tensor, deviation: Tensor, eps: float, dtype: torch.dtype, extra: Tensor | float = 0.0
) -> Tensor:
    """Return the error allowed per element.

    Args:
        truth, deviation: outputs of `oracle.spread`.
        eps: the rounding of the computation.
        dtype: the dtype of the result, to which it is rounded once.
        extra: further error allowed.
    """
    level = deviation + eps * truth.abs()
    if level.dim() and level.numel():
        row = level.nan_to_num(0, 0, 0).amax(-1, keepdim=True)  # elements of a vector share their error
        level = torch.maximum(level, torch.maximum(row, row.median()))
    limits = torch.finfo(dtype)
    return FACTOR * level + limits.eps * truth.abs() + limits.smallest_normal * limits.eps + extra


def compare(name: str, value: Tensor, truth: Tensor, allowed: Tensor) -> None:
    """Raise AssertionError unless each element is within its allowed error, or as NaN or infinite as the truth."""
    assert value.shape == truth.shape, f"{name}: expected shape {list(truth.shape)}, got {list(value.shape)}"
    wide = value.detach().double()
    largest = torch.finfo(value.dtype).max
    overflow = truth.abs() + allowed >= largest  # an infinity is right, and so is the largest number
    near = (wide - truth).abs() <= allowed
    same = (
        (wide == truth)
        | (wide.isnan() & truth.isnan())
        | (~wide.isfinite() & truth.isinf())
        | (overflow & ~wide.isnan())
    )
    wrong = ~(near | same)
    if wrong.any():
        position = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{name}{list(position)}: {float(wide[position])}, expected {float(truth[position])} "
            f"± {float(allowed[position] if allowed.dim() else allowed):.3g}; {int(wrong.sum())} of {wrong.numel()} are wrong"
        )
