"""What a trained model does on the test samples beyond its accuracy: calibration, confusion, a map of the features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gistops.nn import ConstellationClassifier

from ..data.dataset import Dataset
from ..model.model import Model
from ..shot_groups import split_classes
from .evaluate import samples_at_once

BINS = 15  # of confidence
MAPPED_CLASSES = 10
MAPPED_SAMPLES = 60  # of each of them, at most
CONFUSED = 3  # classes that a class is most often taken for
LISTED = 100  # few-shot classes, of more those that are most often taken for one other


@torch.no_grad()
def analyse(model: Model, data: Dataset, rule: str, seed: int) -> dict[str, Any]:
    """Plain values for the report, of the head's own predictions; the model is left in training mode."""
    device = next(model.parameters()).device
    model.eval()
    confidence, predicted, common = [], [], []
    displaced = isinstance(model.head, ConstellationClassifier) and model.head.num_displacements > 0
    for part in data.x_test.split(samples_at_once(data.num_classes)):
        if displaced:
            logits, slots = model.head(model.features(part.to(device)), return_slots=True)
            common.append(common_slot(slots).cpu())
        else:
            logits = model(part.to(device))
        best = logits.softmax(1).max(1)
        confidence.append(best.values.cpu())
        predicted.append(best.indices.cpu())
    made: dict[str, Any] = {"common_slot": float(torch.cat(common).mean())} if displaced else {}
    made |= {
        "calibration": calibration(torch.cat(confidence), torch.cat(predicted) == data.y_test),
        "confusion": confusion(torch.cat(predicted), data, rule),
        "map": feature_map(model, data, seed),
    }
    model.train()
    return made


def common_slot(slots: Tensor) -> Tensor:
    """For each sample the share of the classes that its most frequent slot wins, [b]; slots [b, K].

    f·(w_k + δ_j) is a part that depends on the class and a part that depends on the slot: but for the lengths of w_k + δ_j
    all classes choose the same slot, which raises all logits alike and decides nothing.
    """
    counts = torch.stack([(slots == j).sum(1) for j in range(int(slots.max()) + 1)])
    most: Tensor = counts.max(0).values
    return most / slots.shape[1]


def calibration(confidence: Tensor, correct: Tensor) -> dict[str, Any]:
    """Accuracy and mean confidence of samples in bins of equal width, and the expected calibration error.

    Guo et al., ICML 2017.

    Args:
        confidence: probability of the predicted class, [n].
        correct: whether it is the right one, [n] bool.
    """
    place = (confidence.double() * BINS).long().clamp(0, BINS - 1)
    count = torch.bincount(place, minlength=BINS)
    some = count.clamp(min=1)
    means = torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, confidence.double()) / some
    shares = torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, correct.double()) / some
    error = float(((means - shares).abs() * count).sum() / len(confidence))
    bins = zip(means.tolist(), shares.tolist(), count.tolist(), strict=True)
    return {"error": error, "bins": [list(values) for values in bins if values[2]]}


def confusion(predicted: Tensor, data: Dataset, rule: str) -> list[dict[str, Any]]:
    """For each few-shot class what its test samples are taken for, the most frequent first; for LISTED of them at most."""
    y, num = data.y_test, data.num_classes
    few = split_classes(data.train_counts, rule)["few"]
    total = torch.bincount(y, minlength=num)
    wrong = few[y] & (predicted != y)
    pairs, counts = torch.unique(y[wrong] * num + predicted[wrong], return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    taken: dict[int, list[tuple[int, int]]] = {int(k): [] for k in (few & (total > 0)).nonzero()}
    for pair, count in zip(pairs[order].tolist(), counts[order].tolist(), strict=True):
        taken[pair // num].append((pair % num, count))
    if len(taken) > LISTED:

        def share(k: int) -> float:
            return taken[k][0][1] / int(total[k]) if taken[k] else 0.0

        taken = {k: taken[k] for k in sorted(taken, key=share, reverse=True)[:LISTED]}
    return [
        {
            "class": data.class_names[k],
            "training": int(data.train_counts[k]),
            "accuracy": (int(total[k]) - sum(count for _, count in others)) / int(total[k]),
            "taken for": [[data.class_names[o], count / int(total[k])] for o, count in others[:CONFUSED]],
        }
        for k, others in taken.items()
    ]


@torch.no_grad()
def feature_map(model: Model, data: Dataset, seed: int) -> dict[str, Any]:
    """t-SNE of unit test features of some classes, with the unit vectors of their constellations (van der Maaten 2008).

    The classes are spread over the sizes; a head without a constellation is drawn without vectors.
    """
    from sklearn.manifold import TSNE  # takes a second, which --help should not

    tested = torch.bincount(data.y_test, minlength=data.num_classes) > 0
    order = data.train_counts.argsort(descending=True, stable=True)
    order = order[tested[order]]
    chosen = order[torch.linspace(0, len(order) - 1, min(MAPPED_CLASSES, len(order))).long()].tolist()
    device = next(model.parameters()).device
    parts, labels = [], []
    for k in chosen:
        rows = (data.y_test == k).nonzero().flatten()[:MAPPED_SAMPLES]
        parts.append(model.features(data.x_test[rows].to(device)))
        labels += [k] * len(rows)
    vectors = _vectors(model.head, chosen)
    points = F.normalize(torch.cat([*parts, *vectors]).float(), dim=1).cpu()
    perplexity = min(30.0, max(1.0, (len(points) - 1) / 3))
    if len(points) < 3:
        return {"classes": [], "samples": [], "vectors": []}
    places = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(points.numpy())
    samples = [
        [data.class_names[k], *place] for k, place in zip(labels, places.round(2).tolist(), strict=False)
    ]
    rest, drawn = places[len(labels) :].round(2).tolist(), []
    for k, group in zip(chosen, vectors, strict=False):
        drawn += [[data.class_names[k], slot, *rest.pop(0)] for slot in range(len(group))]
    return {"classes": [data.class_names[k] for k in chosen], "samples": samples, "vectors": drawn}


def _vectors(head: Any, classes: list[int]) -> list[Tensor]:
    """The vectors of these classes' constellations, [m + 1, d] each; none for heads without, or with rotations or an MLP."""
    if not isinstance(head, ConstellationClassifier) or head.transform != "translation":
        return []
    structure = F.pad(head.displacements, (0, 0, 1, 0))
    return [head.centers[k] + structure for k in classes]
