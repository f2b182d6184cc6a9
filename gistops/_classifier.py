"""The arguments that the public functions share, in two records."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

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


class LossOptions(NamedTuple):
    """The options of a loss, as in `gistops.constellation_cross_entropy`."""

    class_bias: Tensor | None = None
    weight: Tensor | None = None
    margin: Tensor | float | None = None
    margin_kind: MarginKind = "logit"
    reduction: str = "mean"
    ignore_index: int = -100
    label_smoothing: float = 0.0


def no_displacements(vectors: Tensor) -> Tensor:
    """Return the displacements [0, d] of sub-centers and rotations, for vectors of length d."""
    return vectors.new_empty(0, vectors.shape[-1])
