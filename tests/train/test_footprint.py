"""The estimate of memory and disk space, beside the model, gradients, momentum and file of a training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from train import footprint
from train.config import Config
from train.data.dataset import Dataset
from train.methods import METHODS
from train.model.model import read_model_file, save_model
from train.training.trainer import Trainer

from .short_runs import FEATURES, IMAGES

CONFIG = IMAGES.replace(crt_epochs=1)


def size_of(trainer: Trainer, path: Path) -> footprint.ModelSize:
    """Take a step and return the bytes of the tensors that it leaves."""
    trainer.step()
    model = trainer.model
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    momentum = sum(state["momentum_buffer"].nbytes for state in trainer.optimizer.state.values())
    assert gradients == momentum
    save_model(path, model, trainer.data.class_names)
    saved = sum(tensor.nbytes for tensor in read_model_file(path)[1].values())
    return footprint.ModelSize(sum(t.nbytes for t in model.state_dict().values()), gradients, saved)


def check_sizes(name: str, config: Config, data: Dataset, path: Path) -> footprint.ModelSize:
    """Compare the estimates with a training in the first and in the last stage; return the size in the last."""
    trial = footprint.try_network(config, data, 2)
    estimates = footprint.model_sizes(name, config, data, trial)
    trainer = Trainer(name, config, data)
    stages = len(trainer.method.stages)
    if name != "lfme":  # whose first stage has the smaller head of an expert
        assert estimates[0] == size_of(trainer, path)
    while trainer.stage < stages - 1:
        trainer.begin_stage(trainer.stage + 1)
    measured = size_of(trainer, path)
    assert estimates[1] == measured
    return measured


@pytest.mark.parametrize("name", METHODS)
def test_the_model_of_each_method_has_the_estimated_size(name: str, images: Dataset, tmp_path: Path) -> None:
    check_sizes(name, CONFIG, images, tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gist", {"transfer_directions": 3}),
        ("gist", {"displacement_update": "residuals"}),
        ("gist", {"num_displacements": 0}),
        ("gist-mlp", {"stage2_epochs": 0}),
        ("oltr", {"stage2_epochs": 0}),
        ("fslwf", {"stage2_epochs": 0}),
        ("lfme", {"center_features": False}),
    ],
)
def test_options_change_the_size(
    name: str, options: dict[str, object], images: Dataset, tmp_path: Path
) -> None:
    usual = check_sizes(name, CONFIG, images, tmp_path / "model")
    assert check_sizes(name, CONFIG.replace(**options), images, tmp_path / "model") != usual


def test_a_head_without_a_network_has_the_estimated_size(features: Dataset, tmp_path: Path) -> None:
    check_sizes("oltr", FEATURES, features, tmp_path / "model")


def test_the_estimates_count_the_largest_stage(images: Dataset) -> None:
    """oltr's last stage needs the most, lws's first: in the last, only a scale per class is trained."""
    trial = footprint.try_network(CONFIG, images, 2)
    plain, oltr, lws = (
        footprint.memory_needed(name, CONFIG, images, trial) for name in ("plain", "oltr", "lws")
    )
    d, k = trial.features, images.num_classes
    assert lws == plain
    extra = 4 * (
        2 * k * d + d * (d + 1)
    )  # the centroids, the weights and the selector, beside the linear classifier
    training_features = 2 * 4 * len(images.y_train) * d
    assert oltr - plain == 3 * extra + training_features
    plain, oltr = (
        footprint.disk_needed(CONFIG.replace(methods=(name,)), images, trial) for name in ("plain", "oltr")
    )
    assert oltr - plain == (3 * 2 + 1) * extra


def test_an_estimate_takes_no_random_numbers(images: Dataset) -> None:
    trial = footprint.try_network(CONFIG, images, 2)
    before = torch.get_rng_state()
    for name in METHODS:
        footprint.model_sizes(name, CONFIG, images, trial)
    assert torch.equal(torch.get_rng_state(), before)
