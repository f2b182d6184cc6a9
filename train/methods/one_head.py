"""Methods with a single set of centers: COS+CB, COS+CS+CB, and GistNet with w = v."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from gistops.nn import ConstellationClassifier, GistClassifier

from ..config import Config
from .two_stage import TwoStageMethod


class OneHead(TwoStageMethod):
    """COS+CB and, with displacements, COS+CS+CB: one constellation on the balanced stream (Liu et al., ICCV 2021, Table 3).

    L = CE(s, y),    s_k = τ max_j cos(f, w_k + δ_j),  δ_0 = 0
    """

    streams: Literal["balanced"] = "balanced"

    def __init__(self, config: Config, counts: Tensor, *, displacements: bool) -> None:
        super().__init__(config, counts, displacements=displacements)
        self.loss_coefficients = {"loss_balanced": 1.0}

    def make_head(self, in_features: int, num_classes: int) -> nn.Module:
        return ConstellationClassifier(in_features, num_classes, 0, backend=self.backend)

    def losses(
        self, head: ConstellationClassifier, features: Tensor, labels: Tensor, num_balanced: int
    ) -> dict[str, Tensor]:
        return {"loss_balanced": head.loss(features, labels, label_smoothing=self.label_smoothing)}


class CombinedHead(TwoStageMethod):
    """GistNet with w = v: one set of centers and one temperature for both streams (Liu et al., ICCV 2021, Table 3).

    L = L_random + λ L_balanced,    with δ detached in L_balanced, as in `Gist`
    """

    def __init__(self, config: Config, counts: Tensor) -> None:
        super().__init__(config, counts)
        self.prior_exponent = None  # the same scores have two losses, which assume different priors

    def make_head(self, in_features: int, num_classes: int) -> nn.Module:
        return TiedGistClassifier(in_features, num_classes, 0, backend=self.backend)


class TiedGistClassifier(GistClassifier):
    """A `GistClassifier` whose random stream has the centers and the temperature of the balanced stream."""

    def _parameter_shapes(self, num_displacements: int) -> dict[str, tuple[int, ...]]:
        return ConstellationClassifier._parameter_shapes(self, num_displacements)

    def reset_parameters(self) -> None:
        ConstellationClassifier.reset_parameters(self)

    def _reset_shared(self, generator: torch.Generator | None) -> None:
        ConstellationClassifier._reset_shared(self, generator)

    @property
    def random_centers(self) -> nn.Parameter:  # type: ignore[override]
        return self.centers

    @property
    def random_tau(self) -> Tensor:
        return self.tau
