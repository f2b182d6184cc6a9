"""`--balancing prior` and `--center-init means`."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from train.config import Config
from train.data.dataset import Dataset
from train.training.trainer import Trainer

from ..short_runs import FEATURES, IMAGES, finish

PRIOR: Config = FEATURES.replace(balancing="prior", center_features=False, num_displacements=3)
NAMES = ("gist", "cos-gist", "gist-combined", "gist-rotation", "gist-mlp")


def in_float64(name: str, config: Config, data: Dataset, stage: int) -> Trainer:
    """Return a trainer in float64 at the start of a stage."""
    data = dataclasses.replace(data, x_train=data.x_train.double(), x_test=data.x_test.double())
    trainer = Trainer(name, config, data)
    trainer.model.double()
    for number in range(stage + 1):
        trainer.begin_stage(number)
        trainer.model.double()
    return trainer


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stage", [0, 1])
def test_each_random_sample_trains_both_heads(name: str, stage: int, features: Dataset) -> None:
    trainer = in_float64(name, PRIOR.replace(prior_strength=0.8), features, stage)
    assert trainer.method.stages[stage].split(12, 48) == (0, 60)
    assert trainer.batches.sizes[0] == (0, 62)
    head = trainer.model.head
    x, y = torch.randn(20, 12, dtype=torch.float64), torch.randint(5, (20,))
    losses = trainer.training_model(x, y, 0, torch.rand(20))
    prior = 0.8 * (features.train_counts.double() / len(features.y_train)).log()
    torch.testing.assert_close(
        losses["loss_balanced"], F.cross_entropy(head(x) + prior, y), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(losses["loss_random"], F.cross_entropy(head.random_logits(x), y))


def test_methods_of_the_balanced_stream_alone_keep_it(features: Dataset) -> None:
    trainer = Trainer("cos-cb", PRIOR, features)
    assert trainer.batches.sizes[0] == (62, 0)


def test_only_the_balanced_loss_sees_displaced_features(features: Dataset) -> None:
    trainer = in_float64("gist", PRIOR.replace(transfer_directions=4), features, 1)
    head, transfer = trainer.model.head, trainer.model.feature_transfer
    assert transfer is not None
    x, y, uniforms = torch.randn(20, 12, dtype=torch.float64), torch.randint(5, (20,)), torch.rand(20)
    losses = trainer.training_model(x, y, 0, uniforms)
    prior = (features.train_counts.double() / len(features.y_train)).log()
    moved = transfer(x, 20, uniforms)
    assert (moved - x).norm(dim=1).min() > 0.01
    torch.testing.assert_close(
        losses["loss_balanced"], F.cross_entropy(head(moved) + prior, y), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(losses["loss_random"], F.cross_entropy(head.random_logits(x), y))


@pytest.mark.parametrize("directions", [0, 4])
def test_micro_batches_of_shared_samples_add_up(directions: int, features: Dataset) -> None:
    gradients = []
    for accumulate in (1, 4):
        config = PRIOR.replace(batch_size=51, transfer_directions=directions, accumulate=accumulate)
        trainer = in_float64("gist", config, features, 1)
        trainer.step()
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters()})
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], whole, rtol=1e-9, atol=1e-12, msg=name)


def class_directions(x: Tensor, y: Tensor) -> Tensor:
    """Return the unit vectors along the mean unit feature of each class, [K, d] float64."""
    unit = F.normalize(x.double(), dim=1)
    return F.normalize(torch.stack([unit[y == k].mean(0) for k in range(5)]), dim=1)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("name", ["gist", "cos-cb", "cos-balanced-softmax"])
def test_centers_start_from_class_means(name: str, center: bool, features: Dataset) -> None:
    trainer = Trainer(name, FEATURES.replace(center_init="means", center_features=center), features)
    x = features.x_train.double()
    if center:
        deviation = x.std(0, correction=0)
        torch.testing.assert_close(
            trainer.model.center.running_var.double(), deviation.square(), rtol=1e-5, atol=1e-6
        )
        x = (x - x.mean(0)) / deviation
    expected = class_directions(x, features.y_train)
    head = trainer.model.head
    for centers in [head.centers, *([head.random_centers] if name == "gist" else [])]:
        torch.testing.assert_close(centers.detach().double(), expected, rtol=0, atol=1e-4)
    trainer.begin_stage(0)  # again: the statistics are not those of centered features
    torch.testing.assert_close(head.centers.detach().double(), expected, rtol=0, atol=1e-4)
    finish(trainer)
    assert trainer.evaluate()["accuracy"]["overall"] > 0.5


@pytest.mark.parametrize("name", ["gist", "cos-balanced-softmax"])
def test_runs_of_both_options_resume_exactly(name: str, images: Dataset) -> None:
    config = IMAGES.replace(balancing="prior", center_init="means", transfer_directions=3)
    whole = Trainer(name, config, images)
    finish(whole, steps=9)
    half = Trainer(name, config, images)
    finish(half, steps=7)
    rest = Trainer(name, config, images)
    rest.load_state_dict(half.state_dict())
    finish(rest, steps=2)
    for key, value in whole.state_dict()["model"].items():
        assert torch.equal(rest.state_dict()["model"][key], value), key
