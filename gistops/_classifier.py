"""The arguments that the public functions share, in two records."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ._dtensor import local

Transform = Literal["translation", "rotation", "mlp"]
MarginKind = Literal["logit", "cosine", "angle"]


class Classifier(NamedTuple):
    """The arguments of the logits besides input, once they are checked."""

    centers: Tensor  # [K, d]; sub-centers [K, M, d]
    displacements: Tensor  # [m, d]; [0, d] with sub-centers
    tau: Tensor  # one element
    transform: Literal["translation", "rotation", "mlp", "subcenters"] = "translation"
    axis: Tensor | None = None  # of a rotation
    mlp: tuple[Tensor, Tensor] | None = None

    def compute_dtype(self, input: Tensor) -> torch.dtype:
        """Return the dtype of logits, norms and sums: float64 if any tensor but tau is float64, otherwise float32."""
        tensors = (input, self.centers, self.displacements, self.axis, *(self.mlp or ()))
        is_double = any(x is not None and x.dtype == torch.float64 for x in tensors)
        return torch.float64 if is_double else torch.float32


class LossOptions(NamedTuple):
    """The options of a loss, as in `gistops.constellation_cross_entropy`."""

    class_bias: Tensor | None = None
    weight: Tensor | None = None
    margin: Tensor | float | None = None
    margin_kind: MarginKind = "logit"
    reduction: str = "mean"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    sample_negatives: float | None = None
    generator: torch.Generator | None = None


def no_displacements(vectors: Tensor) -> Tensor:
    """Return the displacements [0, d] of sub-centers and rotations, for vectors of length d."""
    return local(vectors).new_empty(0, vectors.shape[-1])
