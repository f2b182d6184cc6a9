"""Predictions from a classifier's top classes: the part that trainable and frozen heads share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._classifier import Classifier
from ..functional.topk import topk


class Prediction(NamedTuple):
    """The top classes per sample, in descending order; all tensors [..., k]."""

    probabilities: Tensor  # over all classes, in the dtype of the logits
    classes: Tensor  # int64
    slots: Tensor  # uint8, the winning slot of the class


class Predictor(nn.Module):
    """The base class of modules that predict classes from features."""

    backend: str | None

    def _classifier(self) -> Classifier:
        """Return the arguments of the logits besides input, unchecked."""
        raise NotImplementedError

    def _known_norms(self, input: Tensor) -> Tensor | None:
        """Return the norms of the centers if they are known."""
        return None

    def _topk(self, input: Tensor, k: int, class_bias: Tensor | None, return_lse: bool) -> tuple[Tensor, ...]:
        norms = self._known_norms(input)
        return topk(input, self._classifier(), k, class_bias, return_lse, self.backend, norms)

    @torch.no_grad()
    def predict(self, input: Tensor, *, class_bias: Tensor | None = None) -> Tensor:
        """Return the class with the largest logit, [...], int64. Ties are broken by the lower class index.

        The logits [..., K] are not materialized.

        Args:
            input: features, [..., in_features].
            class_bias: added to the logits, [num_classes]. The negative log prior adjusts a trained model.

        Raises:
            TypeError, ValueError, gistops.BackendUnavailable: as for `gistops.constellation_topk`.
        """
        return self._topk(input, 1, class_bias, return_lse=False)[1][..., 0]

    @torch.no_grad()
    def predict_topk(self, input: Tensor, k: int, *, class_bias: Tensor | None = None) -> Prediction:
        """Return the k most probable classes. The probabilities are normalized over all classes.

        The logits [..., K] are not materialized.

        Args:
            input, class_bias: as in `predict`.
            k: number of classes, 1 to num_classes.

        Returns:
            Probabilities, classes and slots, [..., k], in descending order; of equal logits the lower class comes first.

        Raises:
            TypeError, ValueError, gistops.BackendUnavailable: as for `gistops.constellation_topk`.
        """
        values, classes, slots, lse = self._topk(input, k, class_bias, return_lse=True)
        return Prediction((values - lse[..., None]).exp(), classes, slots)
