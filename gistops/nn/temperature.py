"""The temperature of a head: the softplus of a parameter."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dtensor import FSDP, local
from ..operators.registry import compute_dtype


def positive(raw: Tensor) -> Tensor:
    """Return softplus of a parameter [1] as a scalar, in float32 (float64 for float64): bfloat16 is too coarse.

    Raises:
        TypeError: the parameter is a DTensor that is not whole in each process.
    """
    placements = getattr(raw, "placements", ())  # of a DTensor
    if not all(p.is_replicate() for p in placements):
        raise TypeError(f"raw_tau: expected a DTensor with placement Replicate(), got {placements}. {FSDP}")
    raw = local(raw)
    return F.softplus(raw.to(compute_dtype(raw))).reshape(())


def inverse_softplus(value: float) -> float:
    """Return the number whose softplus is `value`, which is above 0."""
    return value + math.log(-math.expm1(-value))


def check_representable(tau: float, dtype: torch.dtype) -> None:
    """Check that a parameter of this dtype can hold the temperature.

    Raises:
        ValueError: the parameter would be infinite, or its softplus zero.
    """
    low = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny
    high = torch.finfo(dtype).max
    if not low <= tau <= high:
        raise ValueError(f"tau: expected {low:.3g} to {high:.3g} for parameters of {dtype}, got {tau}")
