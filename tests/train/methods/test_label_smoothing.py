"""--label-smoothing: the loss by its definition, and the methods without one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from train.checks import problems_of
from train.config import Config, ConfigError
from train.data.dataset import Dataset
from train.methods import METHODS
from train.training.trainer import Trainer

from ..short_runs import FEATURES

SMOOTHED = [
    name for name, make in METHODS.items() if make(FEATURES, torch.tensor([9, 5, 3, 2, 1])).smooths_labels
]


def definition(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Return the cross-entropy with the target (1 - s) · one-hot + s / K."""
    target = (1 - smoothing) * F.one_hot(labels, logits.shape[1]) + smoothing / logits.shape[1]
    return -(target * logits.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("name", SMOOTHED)
def test_each_loss_is_that_of_smoothed_labels(name: str, features: Dataset) -> None:
    trainer = Trainer(name, FEATURES.replace(label_smoothing=0.25, crt_epochs=1), features)
    method, model, n = trainer.method, trainer.model, 30
    x, y = features.x_train[: 2 * n], features.y_train[: 2 * n]
    num_balanced = {"both": n, "balanced": 2 * n}.get(method.stages[0].streams, 0)
    losses = method.losses(model.head, x, y, num_balanced)
    bias = method.log_prior if "balanced-softmax" in name else 0.0
    with torch.no_grad():
        if "loss_balanced" in losses:
            expected = definition(model.head(x[:num_balanced]), y[:num_balanced], 0.25)
            torch.testing.assert_close(losses["loss_balanced"].detach(), expected)
        else:
            expected = definition(model.head(x) + bias, y, 0.25)
            torch.testing.assert_close(losses["loss_random"].detach(), expected)
        if num_balanced == n:  # the random stream's head beside it
            random = model.head.losses(x[:n], y[:n], x[n:], y[n:])[1]
            assert losses["loss_random"] != random


def test_other_losses_are_refused(features: Dataset) -> None:
    config = FEATURES.replace(label_smoothing=0.1, methods=("gist", "focal"))
    problems = list(map(str, problems_of(config, features)))
    assert any("with --label-smoothing, got focal" in problem for problem in problems)
    assert not list(problems_of(config.replace(methods=tuple(SMOOTHED)), features))
    with pytest.raises(
        ConfigError, match="--label-smoothing: expected a share, at least 0 and below 1, got 1"
    ):
        Config().replace(label_smoothing=1)
