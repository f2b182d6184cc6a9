"""τ-normalized classifiers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import distributed
from ..evaluation.evaluate import eval_batch_size
from ..model.model import Model
from .decoupled import Decoupled, set_classifier
from .method import StageData

GRID = [step / 10 for step in range(21)]  # the exponents that the authors' code compares
#: The maximum of the curve over the exponents in the authors' repository: ImageNet-LT, ResNeXt-50.
DEFAULT = 0.7


class TauNormalized(Decoupled):
    """The classifier of `plain` with weights of more equal length (Kang et al., ICLR 2020, section 4, "τ-normalized").

        s_k = w_k · f / ‖w_k‖^t,    without biases

    t is --tau-norm. If the option is not given, t is the value in GRID with the largest mean of the classes' accuracies on
    the validation split (of several, the smallest); without a validation split, t is 0.7. Test samples never select it.
    """

    chosen: dict[str, Any]  # t and how it was chosen, after `finish`

    @torch.no_grad()
    def finish(self, model: Model, data: StageData) -> None:
        assert isinstance(model.head, nn.Linear)
        weight = model.head.weight.double()
        exponent, source = self.config.baselines.tau_norm, "--tau-norm"
        if exponent is None:
            exponent, source = distributed.broadcast_from_rank0(lambda: _choose(weight, data))
        self.chosen = {"tau_norm": exponent, "tau_norm_from": source}
        set_classifier(model, weight / norms(weight)[:, None] ** exponent, weight.new_zeros(len(weight)))
        self.is_plain = False

    def describe(self, head: Any) -> dict[str, Any]:
        return getattr(self, "chosen", {})


def _choose(weight: Tensor, data: StageData) -> tuple[float, str]:
    """Return the exponent and what it comes from, for the records."""
    validation = data.validation()
    if validation is None:
        return DEFAULT, "the maximum on ImageNet-LT, as there are no validation samples"
    return best_exponent(weight, *validation), "validation samples"


def norms(weight: Tensor) -> Tensor:
    """Return the norms of the rows, [K], or the smallest number of float32 where a row is zero."""
    lengths: Tensor = weight.norm(dim=1)
    return lengths.clamp(min=torch.finfo(torch.float32).tiny)


def best_exponent(weight: Tensor, features: Tensor, labels: Tensor) -> float:
    """Return the exponent in GRID with the largest mean of the classes' accuracies; the smallest of several.

    Args:
        weight: the weights of the classifier, [K, d] float64.
        features: the features of the samples, [n, d].
        labels: their classes, [n]. Classes without samples do not count.
    """
    num_classes = len(weight)
    factors = [norms(weight) ** -exponent for exponent in GRID]
    correct = torch.zeros(len(GRID), num_classes, dtype=torch.float64)
    size = eval_batch_size(num_classes)
    for rows, classes in zip(features.split(size), labels.split(size), strict=True):
        logits = rows.double() @ weight.T
        for counts, factor in zip(correct, factors, strict=True):
            hits = classes[(logits * factor).argmax(1) == classes]
            counts += torch.bincount(hits, minlength=num_classes).cpu()
    total = torch.bincount(labels, minlength=num_classes).cpu()
    means = (correct[:, total > 0] / total[total > 0]).mean(1).tolist()
    return GRID[means.index(max(means))]
