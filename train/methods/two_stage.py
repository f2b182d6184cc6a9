"""The common part of methods with two stages: cosine classifiers that get displacements in the second stage."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

import gistops
from gistops.nn import ConstellationClassifier, GistClassifier

from .. import distributed
from ..config import Config
from ..model.feature_transfer import FeatureTransfer
from ..model.model import Model
from ..model.sharded_head import local, mean_norm
from .class_means import start_from_class_means
from .method import Method, Stage, StageData, describe_constellation
from .residual_directions import residual_directions


class TwoStageMethod(Method):
    """A cosine classifier in the first stage, a constellation with displacements in the second.

    By default it trains on both streams with a `GistClassifier`. The displacements are trained by gradients or follow the
    residual directions of the features (--displacement-update).

    Args:
        config: the options of the run.
        counts: the number of training samples of each class, [K].
        displacements: add displacements in the second stage.
    """

    shards_classes = True
    smooths_labels = True
    mixes_labels = True
    transfers_features = False  # whether --transfer-directions applies
    transform: Literal["translation", "rotation", "mlp"] = "translation"
    streams: Literal["both", "balanced"] = "both"  # with --balancing sampling

    def __init__(self, config: Config, counts: Tensor, *, displacements: bool = True) -> None:
        super().__init__(config, counts)
        self.num_displacements = config.method.num_displacements if displacements else 0
        shared = self.streams == "both" and config.method.balancing == "prior"
        streams: Literal["both", "balanced", "shared"] = "shared" if shared else self.streams
        self.balanced_bias = self.log_prior if shared else None
        self.prior_exponent = (
            1 - config.method.prior_strength if shared else 0.0
        )  # of the balanced stream's loss
        self.stages = [
            Stage("stage 1", config.optim.stage1_epochs, streams),
            Stage("stage 2", config.optim.stage2_epochs, streams),
        ]
        self.loss_coefficients = {"loss_balanced": config.method.balanced_loss_weight, "loss_random": 1.0}

    def losses(
        self, head: GistClassifier, features: Tensor, labels: Tensor, num_balanced: int
    ) -> dict[str, Tensor]:
        (f_b, f_r), (y_b, y_r) = features.tensor_split([num_balanced]), labels.tensor_split([num_balanced])
        balanced, random = head.losses(  # the head routes the gradients
            *(f_b, y_b, f_r, y_r), balanced_bias=self.balanced_bias, label_smoothing=self.label_smoothing
        )
        return {"loss_balanced": balanced, "loss_random": random}

    def restructure(self, model: Model) -> None:
        # Without epochs in the second stage, displacements would stay at their random start.
        if not self.num_displacements or not self.stages[1].epochs:
            return
        head, options = constellation(model), self.config.displacements
        head.add_displacements(self.num_displacements, scale=options.displacement_scale)
        if self._follows_residuals(head):
            head.displacements.requires_grad_(False)
        if self.transfers_features and options.transfer_directions:
            transfer = FeatureTransfer(options.transfer_directions, head.in_features, options.transfer_length)
            model.feature_transfer = transfer.to(head.centers.device, head.centers.dtype)

    def begin_stage(self, stage: int, model: Model, data: StageData) -> None:
        head = constellation(model)
        if stage == 0 and self.config.method.center_init == "means":
            random = [head.random_centers] if isinstance(head, GistClassifier) else []
            start_from_class_means([head.centers, *random], model, data)
        if stage == 1:
            self.restructure(model)
            if head.num_displacements:
                self._set_residual_directions(model, data, start=True)

    def end_epoch(self, model: Model, data: StageData) -> None:
        if constellation(model).num_displacements:
            self._set_residual_directions(model, data, start=False)

    def num_directions(self) -> int:
        """Return the largest number of residual directions that the second stage computes at once; 0 for none."""
        options = self.config.displacements
        if not self.num_displacements or not self.stages[1].epochs:
            return 0
        residuals = "residuals" in (options.displacement_init, options.displacement_update)
        displacements = self.num_displacements if residuals and self.transform == "translation" else 0
        return max(displacements, options.transfer_directions if self.transfers_features else 0)

    def reads_training_features(self) -> bool:
        return self.num_directions() > 0 or self.config.method.center_init == "means"

    def _follows_residuals(self, head: ConstellationClassifier) -> bool:
        """Return whether displacements follow the residuals. Rotations and MLPs are always trained by gradients."""
        residuals = self.config.displacements.displacement_update == "residuals"
        return residuals and head.transform == "translation"

    @torch.no_grad()
    def _set_residual_directions(self, model: Model, data: StageData, start: bool) -> None:
        """Set displacements and transfer directions to the residual directions of the features, as the options ask for.

        Args:
            model: the model.
            data: returns the features of the training samples.
            start: at the start of the stage; later, the clustering continues from the current directions.
        """
        head, options = constellation(model), self.config.displacements
        init = start and options.displacement_init == "residuals" and head.transform == "translation"
        targets: list[tuple[Tensor, Tensor | float]] = []  # tensors to set and the norms of their rows
        if init or self._follows_residuals(head):
            scale = options.displacement_scale or head.displacement_scale
            targets.append((local(head.displacements), scale * mean_norm(head.centers)))
        if model.feature_transfer is not None:
            targets.append((model.feature_transfer.directions, 1.0))
        if not targets:
            return
        features, labels = data.training()
        for target, norm in targets:

            def directions(target: Tensor = target) -> Tensor:
                first = None if start else target
                seed = self.config.run.seed
                return residual_directions(features, labels, self.counts, len(target), seed, first).cpu()

            # On rank 0 only: features may differ in the last bit between GPUs, and the clusters would differ too.
            target.copy_(norm * distributed.broadcast_from_rank0(directions).to(target))

    def alternative_scores(
        self, head: ConstellationClassifier, features: Tensor, logits: Tensor
    ) -> dict[str, Tensor]:
        """Return the scores of the centers without the displacements, to see what the displacements change."""
        if not head.num_displacements:
            return {}
        no_displacements = head.displacements[:0]
        scores = gistops.constellation_logits(
            features, head.centers, no_displacements, head.tau, backend=head.backend
        )
        assert isinstance(scores, Tensor)
        return {"centers alone": scores}

    def alternative_predictions(self, head: ConstellationClassifier, features: Tensor) -> dict[str, Tensor]:
        if not head.num_displacements:
            return {}
        no_displacements = local(head.displacements)[:0]
        _, classes, _ = gistops.constellation_topk(
            features, head.centers, no_displacements, head.tau, k=1, backend=head.backend
        )
        return {"centers alone": classes[:, 0]}

    def describe(self, head: ConstellationClassifier) -> dict[str, Any]:
        return describe_constellation(head)


def constellation(model: Model) -> ConstellationClassifier:
    """Return the head of a model, which must be a constellation classifier."""
    assert isinstance(model.head, ConstellationClassifier)
    return model.head
