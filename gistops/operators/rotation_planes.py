"""The op `rotation_planes` of the CPU: what rotations share for all classes. `csrc/schema.cpp` describes the arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .registry import Op


class RotationPlanes(NamedTuple):
    """Arguments of `rotation_planes`."""

    displacements: Tensor
    axis: Tensor
    dtype: torch.dtype


class Planes(NamedTuple):
    """Outputs of `rotation_planes`."""

    directions: Tensor
    turns: Tensor


class RotationPlanesBackward(NamedTuple):
    """Arguments of `rotation_planes_backward`."""

    grad_directions: Tensor
    grad_turns: Tensor
    displacements: Tensor
    axis: Tensor


class PlanesGradients(NamedTuple):
    """Outputs of `rotation_planes_backward`."""

    grad_displacements: Tensor
    grad_axis: Tensor


def _fake(a: RotationPlanes) -> Planes:
    m, d = a.displacements.shape
    return Planes(
        a.displacements.new_empty(m + 1, d, dtype=a.dtype), a.displacements.new_empty(3, m, dtype=a.dtype)
    )


def _backward_fake(a: RotationPlanesBackward) -> PlanesGradients:
    return PlanesGradients(a.displacements.new_empty(a.displacements.shape), a.axis.new_empty(a.axis.shape))


#: Without an autograd formula: `backends/cpu_planes.py` has a function that calls both.
ROTATION_PLANES = Op("rotation_planes", RotationPlanes, Planes, _fake)
ROTATION_PLANES_BACKWARD = Op(
    "rotation_planes_backward", RotationPlanesBackward, PlanesGradients, _backward_fake
)
