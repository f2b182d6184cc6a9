"""Analyses of a trained model on the test samples beyond accuracy: calibration, confusions, a map of the features."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gistops.nn import ConstellationClassifier

from .. import distributed
from ..data.dataset import Dataset
from ..model.model import Model
from ..model.sharded_head import common_slots, is_sharded, local, rows_of
from .confusions import confusion, examples
from .evaluate import eval_batch_size, own_features

BINS = 15  # intervals of confidence
MAPPED_CLASSES = 10
MAPPED_SAMPLES = 60  # per class, at most


@torch.no_grad()
def analyze(model: Model, data: Dataset, rule: str, seed: int) -> dict[str, Any]:
    """Analyze the head's own predictions; return plain values, which metrics.jsonl can hold.

    The model is left in training mode.
    """
    model.eval()
    confidence, predicted, common = (_top_classes if is_sharded(model.head) else _predictions)(model, data)
    result: dict[str, Any] = {} if common is None else {"common_slot": common}
    result |= predictions(confidence, predicted, data, rule) | {"map": feature_map(model, data, seed)}
    model.train()
    return result


def predictions(confidence: Tensor, predicted: Tensor, data: Dataset, rule: str) -> dict[str, Any]:
    """Return the part of the analysis that needs the predictions alone.

    Args:
        confidence: the probability of the predicted class of each test sample, [n].
        predicted: the predicted class, [n].
        data: the dataset.
        rule: the rule of the groups of classes.
    """
    correct = predicted == data.y_test
    return {
        "calibration": calibration(confidence, correct),
        "confusion": confusion(predicted, data, rule),
        "examples": examples(confidence, predicted, data, rule),
        "correct": packed(correct, data.y_test),
    }


def _predictions(model: Model, data: Dataset) -> tuple[Tensor, Tensor, float | None]:
    """Return the probability [n] of the predicted class and the class, of each test sample; and the mean common slot."""
    device = next(model.parameters()).device
    confidences, classes, common = [], [], []
    has_displacements = isinstance(model.head, ConstellationClassifier) and model.head.num_displacements > 0
    for samples in data.x_test.split(eval_batch_size(data.num_classes)):
        if has_displacements:
            logits, slots = model.head(model.features(samples.to(device)), return_slots=True)
            common.append(common_slot(slots).cpu())
        else:
            logits = model(samples.to(device))
        best = logits.softmax(1).max(1)
        confidences.append(best.values.cpu())
        classes.append(best.indices.cpu())
    mean = float(torch.cat(common).mean()) if has_displacements else None
    return torch.cat(confidences), torch.cat(classes), mean


def _top_classes(model: Model, data: Dataset) -> tuple[Tensor, Tensor, float | None]:
    """Return `_predictions` of a sharded head, by the top class. Each process takes a part of the samples."""
    head: Any = model.head
    confidences, classes, common = [], [], []
    for features, _ in own_features(model, data.x_test, data.y_test):
        top = head.predict_topk(features, 1)
        confidences.append(top.probabilities[:, 0])
        classes.append(top.classes[:, 0])
        if head.num_displacements:
            common.append(common_slots(features, head).cpu())
    mean = float(torch.cat(common).mean()) if common else None
    confidence, predicted = (
        torch.cat(distributed.all_gather_rows(torch.cat(parts))).cpu() for parts in (confidences, classes)
    )
    return confidence, predicted, mean


def common_slot(slots: Tensor) -> Tensor:
    """Return, for each sample, the share of the classes whose best slot is the sample's most frequent one.

    f·(w_k + δ_j) is a term of the class plus a term of the slot. If the norms ‖w_k + δ_j‖ are equal, all classes
    therefore have the same best slot, which raises all logits equally and does not change the prediction.

    Args:
        slots: the best slot of each class, [b, K].

    Returns:
        The shares, [b].
    """
    counts = torch.stack([(slots == j).sum(1) for j in range(int(slots.max()) + 1)])
    most: Tensor = counts.max(0).values
    return most / slots.shape[1]


def calibration(confidence: Tensor, correct: Tensor) -> dict[str, Any]:
    """Return the expected calibration error, and the mean confidence, accuracy and size of bins of equal width.

    The error is that of Guo et al., ICML 2017.

    Args:
        confidence: the probability of the predicted class, [n].
        correct: True for samples that are classified correctly, [n] bool.
    """
    bins = (confidence.double() * BINS).long().clamp(0, BINS - 1)
    count = torch.bincount(bins, minlength=BINS)
    divisor = count.clamp(min=1)
    means = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, confidence.double()) / divisor
    accuracies = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, correct.double()) / divisor
    error = float(((means - accuracies).abs() * count).sum() / len(confidence))
    rows = zip(means.tolist(), accuracies.tolist(), count.tolist(), strict=True)
    return {"error": error, "bins": [list(row) for row in rows if row[2]]}


def packed(correct: Tensor, y: Tensor) -> str:
    """Return one bit per sample, ordered by class, in base64: the report compares methods sample by sample."""
    bits = correct[y.argsort(stable=True)].numpy()
    return base64.b64encode(np.packbits(bits).tobytes()).decode("ascii")


@torch.no_grad()
def feature_map(model: Model, data: Dataset, seed: int) -> dict[str, Any]:
    """Return a t-SNE map of unit test features and of the unit vectors of their classes' constellations.

    The classes are chosen at even steps from the largest to the smallest. A head without a constellation has no
    vectors. (van der Maaten and Hinton, JMLR 2008.)
    """
    from sklearn.manifold import TSNE  # imported here because it takes a second, also for --help
    from threadpoolctl import threadpool_limits

    tested = torch.bincount(data.y_test, minlength=data.num_classes) > 0
    order = data.train_counts.argsort(descending=True, stable=True)
    order = order[tested[order]]
    chosen = order[torch.linspace(0, len(order) - 1, min(MAPPED_CLASSES, len(order))).long()].tolist()
    device = next(model.parameters()).device
    features, labels = [], []
    for k in chosen:
        rows = (data.y_test == k).nonzero().flatten()[:MAPPED_SAMPLES]
        features.append(model.features(data.x_test[rows].to(device)))
        labels += [k] * len(rows)
    vectors = _constellations(model.head, chosen)
    points = F.normalize(torch.cat([*features, *vectors]).float(), dim=1).cpu()
    # scikit-learn crashes or raises with points that are equal or not finite, as of a network that has collapsed.
    spread = (points - points.mean(0)).abs().max()
    if len(points) < 3 or not points.isfinite().all() or spread < 1e-5:
        return {"classes": [], "samples": [], "vectors": []}
    perplexity = min(30.0, max(1.0, (len(points) - 1) / 3))
    # Threads of OpenMP wait for each other in loops, which beside other programs took up to twenty times as long as one thread.
    with threadpool_limits(1, "openmp"):
        places = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(points.numpy())
    places = places.round(2).tolist()
    samples = [[data.class_names[k], *place] for k, place in zip(labels, places, strict=False)]
    remaining = iter(places[len(labels) :])
    slots = [(k, slot) for k, group in zip(chosen, vectors, strict=False) for slot in range(len(group))]
    mapped = [[data.class_names[k], slot, *next(remaining)] for k, slot in slots]
    return {"classes": [data.class_names[k] for k in chosen], "samples": samples, "vectors": mapped}


def _constellations(head: Any, classes: list[int]) -> list[Tensor]:
    """Return the vectors of each class, [m + 1, d]; an empty list unless the head has translated centers."""
    if not isinstance(head, ConstellationClassifier) or head.transform != "translation":
        return []
    offsets = F.pad(local(head.displacements), (0, 0, 1, 0))
    return [center + offsets for center in rows_of(head.centers, classes)]
