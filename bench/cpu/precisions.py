"""Logits and losses in bfloat16, and in float32 under autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..problem import Size, Tensors, make_tensors

#: bfloat16: input, centers and displacements have this dtype. autocast: all tensors are float32.
PRECISIONS = ("float32", "bfloat16", "autocast")


def tensors(size: Size, precision: str) -> Tensors:
    """Return the arguments of a call in a precision."""
    return make_tensors(size, torch.bfloat16 if precision == "bfloat16" else torch.float32)


def in_precision(function: Callable[..., Any], precision: str) -> Callable[..., Any]:
    """Return `function`, under autocast to bfloat16 if this is the precision. The backward runs outside, as it should."""
    if precision != "autocast":
        return function

    def under_autocast(*arguments: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return function(*arguments)

    return under_autocast
