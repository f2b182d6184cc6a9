"""The temperature of a head: the softplus of a parameter."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from ..operators.registry import compute_dtype


def positive(raw: Tensor) -> Tensor:
    """Return softplus of a parameter [1] as a scalar, in float32 (float64 for float64): bfloat16 is too coarse."""
    return F.softplus(raw.to(compute_dtype(raw))).reshape(())


def inverse_softplus(value: float) -> float:
    """Return the number whose softplus is `value`, which is above 0."""
    return value + math.log(-math.expm1(-value))
