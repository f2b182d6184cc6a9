"""Rotations of class centers, as coefficients for the ops (GistNet, equations 8 and 9).

The paper's g turns a center in the plane of a shared direction u and a displacement. Read as a rotation by the angle from u
to δ̂, the unit vector of δ_j, with c = u·δ̂, v the unit vector of δ̂ - c u, and s = √(1 - c²):

    R_j = I + (c - 1)(u uᵀ + v vᵀ) + s (v uᵀ - u vᵀ)

    f·R_j w = f·w + (f·u) A + (f·v) B,   A = (c - 1)(w·u) - s (w·v),   B = (c - 1)(w·v) + s (w·u),   |R_j w| = |w|

so that w is the only vector per class that is multiplied with the input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._classifier import Classifier
from ...operators.registry import compute_dtype, no_autocast


def plane(displacements: Tensor, axis: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return u [d], v [m, d], cosines c [m] and sines s [m] of the rotations."""
    u = F.normalize(axis, dim=0, eps=1e-12)
    directions = F.normalize(displacements, dim=1, eps=1e-12)
    c = directions @ u
    rest = directions - c[:, None] * u
    s = torch.linalg.vector_norm(rest, dim=1)
    return u, rest / s.clamp(min=1e-12)[:, None], c, s


def coefficients(input: Tensor, classifier: Classifier) -> tuple[Tensor, Tensor]:
    """Return input_coeffs [B, M] and class_coeffs [2, M, K] of `rotation_forward`; differentiable in all arguments."""
    centers, displacements, axis = classifier.centers, classifier.displacements, classifier.axis
    assert axis is not None
    dtype = compute_dtype(input, centers, displacements)
    with no_autocast(input.device.type):
        u, v, c, s = plane(displacements.to(dtype), axis.to(dtype))
        directions = torch.cat([u[None], v])  # [M, d]
        x = input.to(dtype) @ directions.T
        along, across = (directions @ centers.to(dtype).T).split([1, len(v)])  # w·u [1, K], w·v [m, K]
        a = (c - 1)[:, None] * along - s[:, None] * across
        b = (c - 1)[:, None] * across + s[:, None] * along
        return x, F.pad(torch.stack([a, b]), (0, 0, 1, 0))
