"""Checks of numbers among the arguments of the public functions."""

from __future__ import annotations

import sys
from numbers import Integral, Real
from typing import Any

import torch

LARGEST = sys.float_info.max
SMALLEST = 5e-324  # above 0


def check_integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """Return `value` as an int.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is below `low` or above `high`.
    """
    value = plain_scalar(value)
    integer = isinstance(value, Integral) and not isinstance(value, bool)
    number = int(value) if integer else low  # type: ignore[call-overload]
    if integer and number >= low and (high is None or number <= high):
        return number
    # Only an error formats the limits: in a compiled graph, text would make a dynamic limit constant.
    expected = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    if not integer:
        raise TypeError(f"{name}: expected {expected}, got {value!r} of type {type(value).__name__}")
    raise ValueError(f"{name}: expected {expected}, got {number}")


def check_positive(name: str, value: object) -> float:
    """Return `value` as a float.

    Raises:
        TypeError: `value` is not a real number.
        ValueError: `value` is not finite or not above 0.
    """
    return check_number(name, value, "a finite number above 0", SMALLEST)


def check_number(name: str, value: object, expected: str, low: float, high: float = LARGEST) -> float:
    """Return `value` as a float. Scalars of numpy are numbers; arrays, lists, tensors and bools are not.

    Raises:
        TypeError: `value` is not a real number; the message says what was `expected`.
        ValueError: `value` is NaN, below `low` or above `high`.
    """
    value = plain_scalar(value)
    if isinstance(value, bool) or not isinstance(value, (float, Real)):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    if not low <= number <= high:
        raise ValueError(f"{name}: expected {expected}, got {value}")
    return number


def plain_scalar(value: Any) -> Any:
    """Return a number of Python for a scalar of numpy in a compiled graph, which ends there; and any other value itself."""
    return value.item() if is_traced_scalar(value) else value


def is_traced_scalar(value: object) -> bool:
    """Return True for a scalar of numpy in a compiled graph, where it is an array without dimensions."""
    return torch.compiler.is_compiling() and type(value).__name__ == "ndarray" and value.ndim == 0  # type: ignore[attr-defined]
