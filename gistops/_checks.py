"""Argument checks, in one place, so that every backend says the same; each message names the argument."""

from __future__ import annotations

import math
import sys
from numbers import Integral, Real

import torch
from torch import Tensor

MAX_SLOTS = 256  # slots are stored as uint8
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _floating(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if not torch.compiler.is_compiling() and "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import DTensor

        if isinstance(value, DTensor):
            raise TypeError(
                f"{name}: expected a local torch.Tensor, got a DTensor; call .to_local() or .full_tensor() first"
            )
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {value.dtype}")
    return value


def _shape(value: Tensor) -> str:
    return str(list(value.shape))


def check_constellation(input: object, centers: object, displacements: object, tau: object) -> Tensor:
    """Check the arguments of a constellation operator; return tau as a tensor.

    Raises:
        TypeError: not a dense floating-point tensor, or a DTensor.
        ValueError: a shape or device that does not fit the others.
    """
    input = _floating("input", input)
    centers = _floating("centers", centers)
    displacements = _floating("displacements", displacements)
    if input.dim() != 2:
        raise ValueError(f"input: expected shape [B, d], got {_shape(input)}")
    d = input.shape[1]
    if d == 0:
        raise ValueError(f"input: expected shape [B, d] with d >= 1, got {_shape(input)}")
    for name, value, rows in (("centers", centers, "K"), ("displacements", displacements, "m")):
        if value.dim() != 2 or value.shape[1] != d:
            raise ValueError(
                f"{name}: expected shape [{rows}, {d}] to match input's last dimension, got {_shape(value)}"
            )
        if value.device != input.device:
            raise ValueError(f"{name}: expected device {input.device} to match input, got {value.device}")
    if displacements.shape[0] >= MAX_SLOTS:
        raise ValueError(
            f"displacements: expected at most {MAX_SLOTS - 1} rows (slots are uint8), got {_shape(displacements)}"
        )
    if isinstance(tau, (int, float)) and not isinstance(tau, bool):
        tau = torch.tensor(float(tau), dtype=torch.float32, device=input.device)
    tau = _floating("tau", tau)
    if tau.numel() != 1:
        raise ValueError(f"tau: expected a tensor of one element, got shape {_shape(tau)}")
    if tau.device != input.device:
        raise ValueError(f"tau: expected device {input.device} to match input, got {tau.device}")
    return tau


def check_integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """`value` as an int.

    Raises:
        TypeError: it is no integer.
        ValueError: it is below `low` or above `high`.
    """
    expected = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected {expected}, got {value!r} of type {type(value).__name__}")
    number = int(value)
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name}: expected {expected}, got {number}")
    return number


def check_positive(name: str, value: object) -> float:
    """`value` as a finite float above zero.

    Raises:
        TypeError: it is no real number.
        ValueError: it is not finite, or not above zero.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number above 0, got {value!r} of type {type(value).__name__}")
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name}: expected a finite number above 0, got {number}")
    return number
