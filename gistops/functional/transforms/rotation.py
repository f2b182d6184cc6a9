"""Rotations of class centers, as coefficients for the ops (GistNet, equations 8 and 9).

The paper's g turns a center in the plane of a shared direction u and a displacement. Read as a rotation by the angle from u
to δ̂, the unit vector of δ_j, with c = u·δ̂, r = δ̂ - c u and s = |r|:

    R_j = I + (c - 1) u uᵀ - r rᵀ / (1 + c) + r uᵀ - u rᵀ

With p a multiple of r, r = n p, this is a rank-2 term for each slot, so that w is the only vector per class that is
multiplied with the input:

    R_j = I + a u uᵀ + b p pᵀ + n (p uᵀ - u pᵀ)
    f·R_j w = f·w + (f·u) A + (f·p) B,   A = a (w·u) - n (w·p),   B = b (w·p) + n (w·u),   |R_j w| = |w|

p is r itself if c >= 0, which needs no division where s is 0, and the unit vector of r otherwise, where b = c - 1 has no
pole. `constellation_logits` defines the rotations that have no plane.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._classifier import Classifier, no_displacements
from ...backends import cpu_planes
from ...backends.rotation_coeffs import class_coeffs
from ...operators.registry import no_autocast, widest_dtype

EPS = 1e-12  # a norm up to EPS counts as zero, as in `torch.nn.functional.normalize`


class Plane(NamedTuple):
    """The planes and coefficients of m rotations, in the notation of this module."""

    u: Tensor  # [d]
    p: Tensor  # [m, d]
    a: Tensor  # [m], as b and n
    b: Tensor
    n: Tensor


def plane(displacements: Tensor, axis: Tensor) -> Plane:
    """Return the planes of the rotations.

    They are computed in float64: in float32, the plane of a displacement nearly opposite to the axis would be noise. The
    cost does not depend on the number of classes.
    """
    dtype = widest_dtype(axis.device.type)
    axis, displacements = axis.to(dtype), displacements.to(dtype)
    u, length = _normalized(axis)
    directions, lengths = _normalized(displacements)
    no_plane = (length <= EPS) | (lengths <= EPS)
    c = torch.where(no_plane, 1, directions @ u)
    rest = torch.where(no_plane[:, None], 0, directions - c[:, None] * u)
    s = torch.linalg.vector_norm(rest, dim=1)
    backward = c < 0
    opposite = backward & (s <= EPS)
    n = torch.where(backward & ~opposite, s, 1)
    p = torch.where(opposite[:, None], _orthogonal(u), rest / n[:, None])
    a = torch.where(opposite, -2, c - 1)
    b = torch.where(backward, a, -1 / (1 + torch.where(backward, 0, c)))
    return Plane(u, p, a, b, torch.where(opposite, 0, n))


def _orthogonal(u: Tensor) -> Tensor:
    """Return the unit vector in the plane of u and the coordinate axis that is farthest from u, orthogonal to u."""
    nearest = torch.arange(len(u), device=u.device) == u.abs().argmin()
    e = nearest.to(u.dtype)
    return _normalized(e - (e @ u) * u)[0]


def _normalized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unit vectors of x [..., d] and their norms; NaN where a norm has overflowed."""
    norm = torch.linalg.vector_norm(x, dim=-1)
    norm = torch.where(norm == torch.inf, torch.nan, norm)
    return x / norm.clamp(min=EPS)[..., None], norm


class Operands(NamedTuple):
    """The arguments of the ops that depend on the transform; directions and turns: `rotation_forward` in csrc/schema.cpp."""

    input: Tensor
    centers: Tensor
    displacements: Tensor  # [0, d] with directions and turns
    directions: Tensor | None = None  # [M, d]
    turns: Tensor | None = None  # [3, M - 1]


def operands(input: Tensor, classifier: Classifier, backend: str) -> Operands:
    """Return the arguments of the ops of a backend; differentiable. Without rotations, they are those of the call.

    Input and centers of rotations that need gradients get the dtype of the logits, except for the `cpu` backend: the ops sum several
    gradients of each in that dtype, and would round them to half precision one by one.
    """
    if classifier.transform != "rotation":
        return Operands(input, classifier.centers, classifier.displacements)
    dtype = classifier.compute_dtype(input)

    def widened(x: Tensor) -> Tensor:
        wide = backend != "cpu" and torch.is_grad_enabled() and x.requires_grad
        return x.to(dtype) if wide or dtype == torch.float64 else x

    with no_autocast(input.device.type):
        shared = _directions_and_turns(classifier, dtype, backend)
        input, centers = widened(input), widened(classifier.centers)
        return Operands(input, centers, no_displacements(input), *shared)


def coefficients(input: Tensor, classifier: Classifier) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the arguments of the whole loss on GPUs: input, centers, input_coeffs [B, M] and class_coeffs [2, M, K].

    Half precision stays, and so do the products of tensor cores, whose weights are rounded to it anyway.
    """
    centers, dtype = classifier.centers, classifier.compute_dtype(input)
    with no_autocast(input.device.type):
        wide_input, wide_centers = input.to(dtype), centers.to(dtype)
        directions, turns = _directions_and_turns(classifier, dtype)
        y = F.pad(class_coeffs(directions, turns, wide_centers), (0, 0, 1, 0))
        if dtype == torch.float64:
            input, centers = wide_input, wide_centers
        return input, centers, wide_input @ directions.T, y


def _directions_and_turns(
    classifier: Classifier, dtype: torch.dtype, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    displacements, axis = classifier.displacements, classifier.axis
    assert axis is not None
    if backend == "cpu" and cpu_planes.serves(displacements, axis):
        return cpu_planes.directions_and_turns(displacements, axis, dtype)
    u, p, *turns = plane(displacements, axis)
    return torch.cat([u[None], p]).to(dtype), torch.stack(turns).to(dtype)
