"""GistNet and its variants with two sets of centers."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from gistops.nn import ConstellationClassifier, GistClassifier

from ..config import Config
from ..model.sharded_head import highest, local, local_classes
from .two_stage import TwoStageMethod


class Gist(TwoStageMethod):
    """GistNet (Liu, Li, Kang, Hua, Vasconcelos, ICCV 2021, equations 4 to 9); COS+GIST without displacements.

        L          = L_random + λ L_balanced
        L_balanced = CE(s, y) on the balanced stream,  s_k = τ  max_j cos(f, w_k + sg(δ_j))
        L_random   = CE(s, y) on the random stream,    s_k = τ' max_j cos(f, v_k + δ_j)

    δ_0 = 0, λ is --balanced-loss-weight, and sg stops the gradient: the displacements learn from the random stream only.
    `gistops.nn.GistClassifier.losses` routes the gradients. w and δ are kept for inference. Rotations and MLPs replace
    w_k + δ_j with other functions of w_k and δ_j.

    Args:
        config: the options of the run.
        counts: the number of training samples of each class, [K].
        displacements: add displacements in the second stage.
        transform: the way in which displacements change a center.
    """

    transfers_features = True

    def __init__(
        self,
        config: Config,
        counts: Tensor,
        *,
        displacements: bool = True,
        transform: Literal["translation", "rotation", "mlp"] = "translation",
    ) -> None:
        super().__init__(config, counts, displacements=displacements)
        self.transform = transform

    def make_head(self, in_features: int, num_classes: int) -> nn.Module:
        return GistClassifier(
            in_features, num_classes, num_displacements=0, transform=self.transform, backend=self.backend
        )

    def alternative_scores(
        self, head: ConstellationClassifier, features: Tensor, logits: Tensor
    ) -> dict[str, Tensor]:
        """Return also the random head's scores minus the log prior, and the sum of both heads' log-probabilities."""
        assert isinstance(head, GistClassifier)
        adjusted = head.random_logits(features) - self.log_prior
        scores = {
            "random head, adjusted": adjusted,
            "both heads": logits.log_softmax(1) + adjusted.log_softmax(1),
        }
        return scores | super().alternative_scores(head, features, logits)

    def alternative_predictions(self, head: ConstellationClassifier, features: Tensor) -> dict[str, Tensor]:
        assert isinstance(head, GistClassifier)
        own = local_classes(head.centers)
        prior = self.log_prior[own.start : own.stop]
        classes = {
            "random head, adjusted": head.random_predict(features, class_bias=-self.log_prior),
            # The normalization of the log-probabilities does not change the highest sum.
            "both heads": highest(features, head, lambda part, x: part(x) + part.random_logits(x) - prior),
        }
        return classes | super().alternative_predictions(head, features)

    def describe(self, head: ConstellationClassifier) -> dict[str, Any]:
        assert isinstance(head, GistClassifier)
        return super().describe(head) | {"tau_random": float(local(head.random_tau))}
