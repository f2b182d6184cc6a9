"""The precision of sums and losses."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, and a float64 tensor unchanged."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
