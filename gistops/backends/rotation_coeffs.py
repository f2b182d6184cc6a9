"""The coefficients of rotations, from the directions and turns that the ops take: `rotation_forward` in csrc/schema.cpp."""

from __future__ import annotations

import torch
from torch import Tensor


def class_coeffs(directions: Tensor, turns: Tensor, centers: Tensor) -> Tensor:
    """Return A and B of slots 1 to M - 1, [2, M - 1, K]; all tensors have the dtype of the result."""
    along, across = center_dots(directions, centers)
    a, b, n = turns[:, :, None].unbind()
    return torch.stack([a * along - n * across, b * across + n * along])


def center_dots(directions: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Return w·u [1, K] and w·p_j [M - 1, K]."""
    dots = directions @ centers.T
    return dots[:1], dots[1:]
