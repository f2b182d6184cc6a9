"""The lifted structured loss and the range loss against their published formulas in float64, written out pair by pair."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from train.__main__ import main
from train.checks import problems_of
from train.data.dataset import Dataset
from train.methods import METHODS
from train.methods.pair_loss import PairLoss
from train.training.trainer import Trainer

from ..short_runs import FEATURES, IMAGES

NAMES = ("lifted", "range")


def distances_of(x: Tensor) -> Tensor:
    return (x[:, None] - x).norm(dim=2)


def lifted(x: Tensor, y: Tensor) -> Tensor:
    """Return equation 4 of Oh Song et al."""
    losses, distances = [], distances_of(x)
    for i, j in itertools.combinations(range(len(y)), 2):
        negative = y != y[i]
        if y[i] == y[j] and negative.any():
            exponentials = (1 - distances[i, negative]).exp().sum() + (1 - distances[j, negative]).exp().sum()
            losses.append((exponentials.log() + distances[i, j]).clamp(min=0) ** 2)
    return sum(losses) / (2 * len(losses)) if losses else 0 * x.sum()


def range_loss(x: Tensor, y: Tensor) -> Tensor:
    """Return the loss of Zhang et al. as a mean over the classes, with k = 2, margin 0.1 and both weights 0.5."""
    classes = [x[y == k] for k in y.unique()]
    harmonic_means = []
    for samples in classes:
        i, j = torch.triu_indices(len(samples), len(samples), 1)
        largest = distances_of(samples)[i, j].sort(descending=True).values[:2]
        harmonic_means.append(len(largest) / (1 / largest).sum() if len(largest) else 0 * x.sum())
    loss = 0.5 * torch.stack(harmonic_means).mean()
    between = [(a.mean(0) - b.mean(0)).norm() for a, b in itertools.combinations(classes, 2)]
    return loss + 0.5 * (0.1 - min(between)).clamp(min=0) if between else loss


FORMULAS = {"lifted": lifted, "range": range_loss}


def make(name: str, classes: int = 8, samples: int = 4) -> PairLoss:
    """Return the method, for eight classes and groups of `classes` × `samples`."""
    config = FEATURES.replace(classes_per_batch=classes, samples_per_class=samples)
    method = METHODS[name](config, torch.ones(8))
    assert isinstance(method, PairLoss)
    return method


def value_and_gradients(name: str, head: nn.Linear, x: Tensor, y: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    loss = make(name).losses(head, x, y, len(y))["loss_balanced"]
    return [loss, *torch.autograd.grad(loss, [x, head.weight, head.bias])]


LABELS = {
    "a group of 8 classes × 4": torch.arange(8).repeat_interleave(4),
    "classes of 1 to 7 samples": torch.arange(5).repeat_interleave(torch.tensor([1, 2, 3, 7, 7])),
    "classes in any order": torch.tensor([0, 3, 1, 1, 0, 2, 3, 0, 1, 0]),
    "two pairs": torch.tensor([4, 2, 2, 4]),
    "no pair": torch.arange(6),
    "one class": torch.full((6,), 3),
    "one sample": torch.tensor([7]),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", LABELS)
def test_losses_and_gradients_are_those_of_the_formula(name: str, case: str, seed: int) -> None:
    y = LABELS[case]
    x, head = torch.randn(len(y), 6).double(), nn.Linear(6, 8).double()
    expected_x = x.clone().requires_grad_()
    expected = F.cross_entropy(head(expected_x), y)
    expected = expected + FORMULAS[name](F.normalize(expected_x, dim=1), y)
    gradients = torch.autograd.grad(expected, [expected_x, head.weight, head.bias])
    for found, value in zip(value_and_gradients(name, head, x, y), (expected, *gradients), strict=True):
        torch.testing.assert_close(found, value)


def test_class_means_are_pushed_apart_where_they_are_close(seed: int) -> None:
    y = torch.arange(3).repeat_interleave(4)
    x = F.normalize(torch.randn(12, 6).double(), dim=1)
    x[4:8] = F.normalize(x[:4] + 0.02 * torch.randn(4, 6), dim=1)
    x.requires_grad_()
    expected = range_loss(x, y)
    found = make("range").pair_loss(x, y)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x))
    within = sum(range_loss(part, y[:4]) for part in x.split(4)) / 3  # without the hinge
    assert (found - within).item() > 0.01


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("labels", [[2] * 8, [0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 2, 3, 4, 5, 6, 7]])
def test_equal_samples_have_finite_gradients(name: str, labels: list[int]) -> None:
    head = nn.Linear(6, 8)
    x = torch.ones(8, 6).requires_grad_()  # also of zeros, whose direction is undefined
    for features in (x, 0 * x):
        loss = make(name).losses(head, features, torch.tensor(labels), 8)["loss_balanced"]
        assert loss.isfinite()
        assert torch.autograd.grad(loss, x)[0].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_a_step_is_the_mean_over_its_groups(name: str, seed: int) -> None:
    y = torch.cat([torch.randperm(8)[:3].repeat_interleave(4) for _ in range(2)] + [torch.tensor([5, 5])])
    x, head = torch.randn(len(y), 6).double().requires_grad_(), nn.Linear(6, 8).double()
    loss = make(name, classes=3).losses(head, x, y, len(y))["loss_balanced"] - F.cross_entropy(head(x), y)
    units = F.normalize(x, dim=1)
    parts = [FORMULAS[name](units[a:b], y[a:b]) for a, b in ((0, 12), (12, 24), (24, 26))]
    torch.testing.assert_close(loss, (12 * parts[0] + 12 * parts[1] + 2 * parts[2]) / 26)


@pytest.mark.parametrize("name", NAMES)
def test_pairs_are_compared_in_float32_under_autocast(name: str, seed: int) -> None:
    y = torch.arange(5).repeat_interleave(4)
    x, head = torch.randn(20, 6).bfloat16().requires_grad_(), nn.Linear(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = make(name).losses(head, x, y, 20)["loss_balanced"]
        logits = head(x)
    expected = F.cross_entropy(logits.float(), y) + make(name).pair_loss(F.normalize(x.float(), dim=1), y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", NAMES)
def test_features_that_are_not_trained_have_the_cross_entropy_alone(name: str, seed: int) -> None:
    x, y, head = torch.randn(20, 6), torch.randint(8, (20,)), nn.Linear(6, 8)
    loss = make(name).losses(head, x, y, 20)["loss_balanced"]
    torch.testing.assert_close(loss, F.cross_entropy(head(x), y))


def test_no_shape_or_value_of_the_range_loss_depends_on_the_samples() -> None:
    with FakeTensorMode():  # raises where the host would read a value, which a CUDA graph does not allow
        x, y, head = torch.randn(32, 6, requires_grad=True), torch.randint(8, (32,)), nn.Linear(6, 8)
        make("range").losses(head, x, y, 32)["loss_balanced"].backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_pairs_train_the_backbone(name: str, accumulate: int, images: Dataset) -> None:
    trainer = Trainer(name, IMAGES.replace(accumulate=accumulate), images)
    nn.init.zeros_(trainer.model.head.weight)  # so that the cross-entropy does not train the features
    assert trainer.method.group_size == 12
    assert math.isfinite(trainer.step().item())
    assert all(parameter.grad.any() for parameter in trainer.model.backbone.parameters())


def test_a_missing_package_is_named_before_the_training(
    images: Dataset,
    feature_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = IMAGES.replace(methods=("plain", "lifted"))
    assert list(problems_of(config, images)) == []
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning.losses", None)
    expected = "--methods: expected pytorch-metric-learning for lifted, which `pip install '.[baselines]'` installs, got "
    (problem,) = problems_of(config, images)
    assert str(problem).startswith(expected)
    words = f"--recipe features --data {feature_file} --runs {tmp_path} --methods plain lifted".split()
    assert main(["doctor", *words]) == 1
    assert expected in capsys.readouterr().out
    assert main(words) == 2
    assert expected in capsys.readouterr().err


def test_the_package_is_not_imported_with_the_command_line() -> None:
    code = "import sys, train.__main__; sys.exit('pytorch_metric_learning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
