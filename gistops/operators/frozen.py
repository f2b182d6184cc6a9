"""The CPU operators for centres that do not change: norms made once, and logits with them. They have no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from . import registry


def complete() -> None:
    """Add fake kernels."""
    torch.library.register_fake("gistops::constellation_norms", _norms_fake)
    torch.library.register_fake("gistops::constellation_frozen_forward", _forward_fake)


def _norms_fake(centers: Tensor, displacements: Tensor) -> Tensor:
    slots = displacements.shape[0] + 1 if centers.dim() == 2 else centers.shape[1]
    return centers.new_empty(slots, centers.shape[0], dtype=registry.compute_dtype(centers, displacements))


def _forward_fake(
    input: Tensor, centers: Tensor, displacements: Tensor, tau: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = registry.compute_dtype(input, centers, displacements)
    batch, classes = input.shape[0], centers.shape[0]
    return input.new_empty(batch, classes, dtype=dtype), input.new_empty(batch, classes, dtype=torch.uint8)
