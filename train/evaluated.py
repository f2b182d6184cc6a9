"""The evaluation of a trained model on labeled samples, with the numbers that training reports for its test split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gistops.nn import ConstellationClassifier, SlotUsage

from .data.dataset import Dataset
from .evaluation.analysis import calibration, common_slot, feature_map, predictions
from .evaluation.evaluate import Evaluation, details_of, eval_batch_size, record_of
from .evaluation.per_class import ClassScores, Confusions, class_scores, confusions
from .trained import TrainedModel, mean_probabilities

UNCHANGED = (
    "as after training"  # the row of the logits as they are, where others are evaluated in their place
)


@dataclass(frozen=True)
class Results:
    """The evaluation of n samples of K classes.

    `record` is that of metrics.jsonl after training, with the method, the accuracies of each row of the results table, and the
    accuracy of each class. `calibration` has the expected calibration error, and the mean confidence, the accuracy and the
    size of bins of confidence. `classes` has the scores of each class, and `confusions` the confusion matrix. `predicted` [n] are
    positions in the model's classes, and `confidence` [n] their probabilities. `common_slot` is the mean of `analysis.common_slot`;
    None for a head without displacements.
    """

    record: dict[str, Any]
    calibration: dict[str, Any]
    classes: ClassScores
    confusions: Confusions
    predicted: Tensor
    confidence: Tensor
    common_slot: float | None

    @property
    def accuracy(self) -> dict[str, float | None]:
        """The accuracy of all samples, and the mean of the classes' accuracies of each group of classes."""
        accuracy: dict[str, float | None] = self.record["accuracy"]
        return accuracy


@torch.no_grad()
def evaluate_trained(
    trained: TrainedModel,
    x: Tensor,
    y: Tensor,
    class_bias: Tensor | None,
    batch_size: int | None,
    progress: Callable[[int], object],
    *,
    flips: bool,
) -> Results:
    """Classify samples x and compare with their classes y, [n] int64. Arguments are those of `Classifier.evaluate`, checked.

    With `class_bias` or `flips` the logits as they are become another row of the table. The batch size of None gives the bits of
    the evaluation after training.
    """
    num_classes, model, head = len(trained.class_names), trained.model, trained.model.head
    device = next(model.parameters()).device
    usage = SlotUsage(head) if isinstance(head, ConstellationClassifier) else None
    bias = None if class_bias is None else class_bias.to(device)
    predictions: dict[str, list[Tensor]] = {}
    confidences, common = [], []
    size = batch_size or eval_batch_size(num_classes)
    for samples, labels in zip(x.split(size), y.split(size), strict=True):
        features = model.features(samples.to(device))
        if usage is None:
            logits = head(features)
        else:
            logits, slots = head(features, return_slots=True)
            usage.update_slots(slots, labels.to(device))
            common.append(common_slot(slots).cpu())
        scores = {"": logits} | trained.method.alternative_scores(head, features, logits)
        if flips:
            mirrored = model(samples.flip(3).to(device))
            scores[""] = mean_probabilities([logits, mirrored]).log()
        if bias is not None:
            scores[""] = scores[""] + bias
        if scores[""] is not logits:
            scores = {"": scores.pop(""), UNCHANGED: logits} | scores
        for name, values in scores.items():
            predictions.setdefault(name, []).append(values.argmax(1).cpu())
        confidences.append(scores[""].softmax(1).amax(1).cpu())
        progress(len(labels))
    predicted = {name: torch.cat(parts) for name, parts in predictions.items()}
    confidence = torch.cat(confidences)
    shares = None if usage is None else usage.shares().cpu()
    own = predicted[""]
    pairs = confusions(y, own, num_classes)
    has_displacements = getattr(head, "num_displacements", 0) > 0
    return Results(
        record=_record(trained, y, predicted, shares),
        calibration=calibration(confidence, own == y),
        classes=class_scores(y, own, pairs, num_classes),
        confusions=pairs,
        predicted=own,
        confidence=confidence,
        common_slot=float(torch.cat(common).mean()) if has_displacements else None,
    )


def _record(
    trained: TrainedModel, y: Tensor, predicted: dict[str, Tensor], slot_usage: Tensor | None
) -> dict[str, Any]:
    """Return the record of the result, with the keys of metrics.jsonl."""
    num_classes, counts, rule = len(trained.class_names), trained.train_counts, trained.split_rule
    total = torch.bincount(y, minlength=num_classes)
    evaluations = {
        name: Evaluation(
            torch.bincount(y[classes == y], minlength=num_classes), total, None if name else slot_usage
        )
        for name, classes in predicted.items()
    }
    own = evaluations.pop("")
    record = {"method": trained.method_name} | record_of(own, evaluations, counts, rule)
    return record | details_of(own, counts) | trained.method.describe(trained.model.head)


def analysis_of(trained: TrainedModel, data: Dataset, results: Results) -> dict[str, Any]:
    """Return the analysis of the predictions for the report page, as training makes it.

    Args:
        trained: the model.
        data: the evaluated samples, as `as_dataset` returns them.
        results: their evaluation.
    """
    common = {} if results.common_slot is None else {"common_slot": results.common_slot}
    found = predictions(results.confidence, results.predicted, data, trained.split_rule)
    return common | found | {"map": feature_map(trained.model, data, seed=0)}


def as_dataset(trained: TrainedModel, x: Tensor, y: Tensor) -> Dataset:
    """Return samples as the test split of a dataset without training samples, but with their number in each class."""
    return Dataset(x[:0], y[:0], x, y, trained.class_names, trained.train_counts)
