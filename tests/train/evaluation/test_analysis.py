"""Calibration, common slots, confusions and the feature map, by hand or one class at a time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_info, threadpool_limits

from train.data.dataset import Dataset
from train.evaluation.analysis import BINS, analyze, calibration, common_slot, feature_map
from train.evaluation.confusions import confusion
from train.training.trainer import Trainer

from ..short_runs import FEATURES, finish


def test_calibration_by_hand() -> None:
    confidence = torch.tensor([0.05, 0.05, 0.95, 0.95, 0.95, 1.0])
    correct = torch.tensor([False, True, True, True, False, True])
    found = calibration(confidence, correct)
    assert [count for _, _, count in found["bins"]] == [2, 4]
    assert found["bins"][0][:2] == pytest.approx([0.05, 0.5])
    assert found["bins"][1][:2] == pytest.approx([0.9625, 0.75])
    assert found["error"] == pytest.approx((2 * 0.45 + 4 * 0.2125) / 6)
    exact = torch.rand(100_000)
    assert calibration(exact, torch.rand(100_000) < exact)["error"] < 0.01
    assert len(calibration(exact, exact > 0)["bins"]) == BINS


def test_common_slot_by_hand() -> None:
    slots = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 2], [2, 1, 0, 2]], dtype=torch.uint8)
    assert common_slot(slots).tolist() == [1.0, 0.5, 0.5]


def test_the_few_shot_classes_with_the_highest_confusion_are_listed(
    features: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted = features.y_test.clone()
    predicted[(features.y_test == 4).nonzero().flatten()[:5]] = 0
    predicted[(features.y_test == 3).nonzero().flatten()[:3]] = 0
    monkeypatch.setattr("train.evaluation.confusions.LISTED_CLASSES", 1)
    assert [row["class"] for row in confusion(predicted, features, "standard")] == ["4"]


def test_confusion_by_hand(features: Dataset) -> None:
    """Classes 3 and 4 are few-shot, with 20 test samples each."""
    predicted = features.y_test.clone()
    third = (features.y_test == 3).nonzero().flatten()
    predicted[third[:12]] = 1
    predicted[third[12:15]] = 0
    rows = confusion(predicted, features, "standard")
    assert [row["class"] for row in rows] == ["3", "4"]
    assert rows[0] == {"class": "3", "training": 15, "accuracy": 0.25, "taken for": [["1", 0.6], ["0", 0.15]]}
    assert rows[1]["taken for"] == []


def test_confusion_of_many_classes_one_at_a_time(seed: int) -> None:
    counts = torch.randint(1, 40, (60,))
    y = torch.randint(1, 60, (700,))  # no sample of class 0
    data = Dataset(y, y, y, y, [f"c{k}" for k in range(60)], counts)
    predicted = torch.where(torch.rand(700) < 0.3, y, (y + torch.randint(1, 6, (700,)) ** 2) % 60)
    found = {row["class"]: row for row in confusion(predicted, data, "standard")}
    assert len(found) == int((torch.bincount(y, minlength=60)[counts < 20] > 0).sum())
    for name, row in found.items():
        own = predicted[y == int(name[1:])]
        others = sorted(Counter(own.tolist()).items(), key=lambda pair: (-pair[1], pair[0]))
        shares = [[f"c{k}", n / len(own)] for k, n in others if f"c{k}" != name]
        right = dict(others).get(int(name[1:]), 0) / len(own)
        assert (row["accuracy"], row["taken for"]) == (right, shares[:3])


@pytest.mark.parametrize("method", ["gist", "plain", "gist-rotation"])
def test_the_map_has_the_samples_and_vectors_of_each_class(method: str, features: Dataset) -> None:
    training = Trainer(method, FEATURES.replace(num_displacements=2), features)
    finish(training)
    found = feature_map(training.model, features, seed=0)
    assert len(found["classes"]) == 5
    assert len(found["samples"]) == 100
    slots = [(name, slot) for name, slot, _, _ in found["vectors"]]
    expected = [(name, slot) for name in found["classes"] for slot in range(3)] if method == "gist" else []
    assert slots == expected
    assert found == feature_map(training.model, features, seed=0)


def openmp_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "openmp"}


def test_the_map_takes_one_thread(features: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside other programs t-SNE took 80 s with two threads, and 4 s with one."""
    during = []

    class Watched(TSNE):
        def fit_transform(self, *args: Any) -> Any:
            during.append(openmp_threads())
            return super().fit_transform(*args)

    monkeypatch.setattr("sklearn.manifold.TSNE", Watched)
    with threadpool_limits(2, "openmp"):
        feature_map(Trainer("plain", FEATURES, features).model, features, seed=0)
        assert openmp_threads() == {2}
    assert during == [{1}]


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan")])
def test_a_network_that_collapsed_has_no_map(value: float, features: Dataset) -> None:
    """Equal features make scikit-learn's t-SNE crash, which no exception handler sees."""
    model = Trainer("plain", FEATURES, features).model
    model.features = lambda x: torch.full((len(x), 12), value)  # type: ignore[method-assign]
    assert feature_map(model, features, seed=0) == {"classes": [], "samples": [], "vectors": []}


def test_analysis_does_not_change_the_training(features: Dataset) -> None:
    training = Trainer("gist", FEATURES, features)
    training.step()
    before = training.state_dict()["model"]
    rng = torch.get_rng_state()
    before = {name: value.clone() for name, value in before.items()}
    analyze(training.model, features, "standard", 0)
    assert training.model.training
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in training.state_dict()["model"].items())
