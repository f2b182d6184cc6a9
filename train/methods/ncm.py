"""The nearest class mean classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import distributed
from ..model.model import Model
from .class_means import class_means
from .decoupled import Decoupled, set_classifier
from .method import StageData


class NearestClassMean(Decoupled):
    """The nearest class mean by cosine, on the features of `plain` (Kang et al., ICLR 2020, section 4, "NCM").

        s_k(f) = (f - m) · ĉ_k,    ĉ_k = c_k / ‖c_k‖,    c_k = mean over class k of (f - m) / ‖f - m‖

    m is the mean of all training features. ‖f - m‖ is the same for all classes, so the largest s_k is the largest cosine and
    the smallest Euclidean distance of unit vectors. s_k is a linear classifier, with the weights ĉ_k and the biases -m · ĉ_k.

    The paper normalizes the class means; the features are centered in the authors' code, by its default. The code's default
    distance leaves the length of c_k as it is, which is no linear classifier and differs little.
    """

    def finish(self, model: Model, data: StageData) -> None:
        def classifier() -> list[Tensor]:
            return [tensor.cpu() for tensor in class_mean_classifier(*data.training(), len(self.counts))]

        # On rank 0 only: features may differ in the last bit between GPUs, and the classifiers would differ too.
        set_classifier(model, *distributed.broadcast_from_rank0(classifier))
        self.is_plain = False

    def reads_training_features(self) -> bool:
        return True


def class_mean_classifier(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return the weights ĉ [K, d] and the biases -m · ĉ [K] of the classifier, float64.

    Args:
        features: the features of the training samples, [n, d].
        labels: their classes, [n]. Every class has a sample.
        num_classes: K.
    """
    mean = features.mean(0, dtype=torch.float64)
    centers = F.normalize(class_means(features, labels, num_classes, origin=mean, unit=True), dim=1)
    return centers, -centers @ mean
