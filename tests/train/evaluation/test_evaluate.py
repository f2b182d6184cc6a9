"""Accuracies against counts by hand and against one sample at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gistops.nn import GistClassifier
from train.evaluation.evaluate import Evaluation, evaluate
from train.model.model import Model


def test_accuracy_by_hand() -> None:
    train_counts = torch.tensor([200, 150, 50, 10])
    found = Evaluation(torch.tensor([9, 2, 0, 3]), torch.tensor([10, 4, 0, 4]), None)
    assert found.per_class() == [0.9, 0.5, None, 0.75]
    accuracy = found.accuracy(train_counts, "standard")
    assert accuracy == {"overall": 14 / 18, "many": 0.7, "medium": None, "few": 0.75}


@pytest.mark.parametrize("gist", [False, True])
def test_evaluate_against_one_sample_at_a_time(gist: bool, seed: int) -> None:
    head = GistClassifier(8, 6, 3) if gist else nn.Linear(8, 6)
    model = Model(nn.Identity(), nn.Identity(), nn.BatchNorm1d(8), head, "none")
    x, y = torch.randn(53, 8), torch.randint(0, 6, (53,))
    model(x)  # moves the statistics of the BatchNorm away from where they start
    worst = lambda head, features, logits: {"worst": -logits}  # noqa: E731
    found, others = evaluate(model, x, y, 6, worst, batch_size=10)
    assert model.training
    model.eval()
    correct = torch.zeros(6, dtype=torch.long)
    usage = torch.zeros(4)
    for sample, label in zip(x, y, strict=True):
        correct[label] += int(model(sample[None]).argmax() == label)
        if gist:
            usage[model.head(model.features(sample[None]), return_slots=True)[1][0, label].long()] += 1 / 53
    assert torch.equal(found.correct, correct)
    least = (model(x).argmin(1) == y).sum()
    assert int(others["worst"].correct.sum()) == least
    assert others["worst"].slot_usage is None
    assert torch.equal(found.total, torch.bincount(y, minlength=6))
    if gist:
        torch.testing.assert_close(found.slot_usage, usage)
    else:
        assert found.slot_usage is None
