"""Constellations without their transform: every vector of every class, for programs without gistops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gistops.backends.reference import rotation
from gistops.functional.transforms import mlp
from gistops.nn import ConstellationClassifier


@torch.no_grad()
def prototypes(head: ConstellationClassifier) -> Tensor:
    """Return the unit vectors of all slots [K, m + 1, d], slot 0 of the bare centers. The logits of features f are then

    τ max_j (f / ‖f‖) · v_kj
    """
    w, displacements = head.centers, head.displacements
    if not len(displacements) or head.transform == "translation":
        vectors = w[:, None] + F.pad(displacements, (0, 0, 1, 0))
    elif head.transform == "rotation":
        turns = [rotation(head.axis.double(), each.double()).to(w.dtype) for each in displacements]
        vectors = torch.stack([w, *(w + w @ turn.T for turn in turns)], 1)
    else:
        vectors = mlp.vectors(w, displacements, head.mlp_in, head.mlp_out)
    return F.normalize(vectors, dim=2)
