"""Checks of the numbers that modules and samplers are made with; each message names the argument."""

from __future__ import annotations

import math
from numbers import Integral, Real


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
