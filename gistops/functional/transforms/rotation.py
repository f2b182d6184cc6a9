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

from ..._classifier import Classifier
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


def operands(
    input: Tensor, classifier: Classifier, widen: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return input, centers, input_coeffs [B, M] and class_coeffs [2, M, K] for `rotation_forward`; differentiable.

    Args:
        widen: return input and centers that need gradients in the dtype of the logits. The op and the coefficients both
            use them, and autograd then adds the two gradients of each in that dtype and rounds the sum once. Without
            `widen`, half precision stays, and so do the products of tensor cores, whose weights are rounded to it anyway.
    """
    centers, displacements, axis = classifier.centers, classifier.displacements, classifier.axis
    assert axis is not None
    dtype = classifier.compute_dtype(input)
    with no_autocast(input.device.type):
        wide_input, wide_centers = input.to(dtype), centers.to(dtype)
        u, p, a, b, n = (x.to(dtype) for x in plane(displacements, axis))
        directions = torch.cat([u[None], p])  # [M, d]
        x = wide_input @ directions.T
        along, across = (directions @ wide_centers.T).split([1, len(p)])  # w·u [1, K], w·p [m, K]
        class_a = a[:, None] * along - n[:, None] * across
        class_b = b[:, None] * across + n[:, None] * along
        y = F.pad(torch.stack([class_a, class_b]), (0, 0, 1, 0))
        is_double = dtype == torch.float64
        input = wide_input if is_double or (widen and _needs_gradient(input)) else input
        centers = wide_centers if is_double or (widen and _needs_gradient(centers)) else centers
        return input, centers, x, y


def _needs_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad
