"""--ema-decay, --keep best and --patience: the weights that are evaluated, and those that a stage ends with."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from train import footprint
from train.__main__ import main
from train.checks import problems_of
from train.config import Config, ConfigError
from train.data.dataset import Dataset
from train.model.model import load_model
from train.training.kept_weights import weight_average
from train.training.trainer import Trainer

from ...one_device import OneDevice
from ..short_runs import FEATURES, IMAGES, check_resuming, equal


@pytest.fixture
def validated(features: Dataset) -> Dataset:
    """The features with their test samples as validation samples too."""
    return dataclasses.replace(features, x_val=features.x_test, y_val=features.y_test)


@pytest.mark.parametrize("method", ["gist", "crt", "lfme"])
def test_the_average_goes_on_to_the_same_bits(method: str, images: Dataset, seed: int) -> None:
    config = IMAGES.replace(ema_decay=0.8, crt_epochs=1, stage2_epochs=1)
    check_resuming(method, config, images, random.Random(seed).randrange(1, 9))


def test_the_average_is_exponential_and_is_evaluated(features: Dataset) -> None:
    trainer = Trainer("gist", FEATURES.replace(ema_decay=0.75), features)
    expected: Tensor | None = None
    for _ in range(4):
        trainer.step()
        centers = trainer.model.head.centers.detach().clone()
        expected = centers if expected is None else 0.75 * expected + 0.25 * centers
    torch.testing.assert_close(trainer.evaluated_model.head.centers.detach(), expected)
    before = trainer.evaluate()
    trainer.model.head.centers.data.zero_()
    assert trainer.evaluate() == before
    trainer.evaluated_model.head.centers.data.zero_()
    assert trainer.evaluate() != before


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_indices_are_copied_into_the_average(decay: float, images: Dataset) -> None:
    """The average of an index with itself, rounded down, may be the index before it."""
    trainer = Trainer("gist", IMAGES, images)
    trainer.model.register_buffer("classes", torch.arange(1000))
    trainer.model.register_buffer("group", torch.arange(1000) % 3 == 0)
    trainer.average = weight_average(trainer.model, decay)
    for step in range(1, 4):
        trainer.step()
        model, average = (dict(m.named_buffers()) for m in (trainer.model, trainer.evaluated_model))
        for name, value in model.items():
            if not value.is_floating_point():
                assert torch.equal(average[name], value), (name, step)


def test_an_update_copies_nothing_between_devices(features: Dataset) -> None:
    """meta stands for a GPU."""
    model = Trainer("gist", FEATURES, features).model.to("meta")
    average = weight_average(model, 0.9)
    assert average is not None
    with OneDevice():
        average.update_parameters(model)
        average.update_parameters(model)


def test_a_stage_ends_with_the_average(features: Dataset) -> None:
    trainer = Trainer("gist", FEATURES.replace(ema_decay=0.9), features)
    for _ in range(trainer.steps_per_epoch):
        trainer.step()
    average = {name: tensor.clone() for name, tensor in trainer.evaluated_model.state_dict().items()}
    assert not equal(average, dict(trainer.model.state_dict()))
    trainer.begin_stage(1)
    after = trainer.model.state_dict()
    assert all(torch.equal(average[name], after[name]) for name in average if name != "head.displacements")


def run(file: Path, runs: Path, *more: str) -> list[dict[str, object]]:
    words = f"--recipe features --data {file} --runs {runs} --name r --classes-per-batch 3 --device cpu"
    assert main([*words.split(), *more]) == 0
    return [json.loads(line) for line in (runs / "r" / "metrics.jsonl").read_text().splitlines()]


def test_the_best_epoch_is_kept_and_saved(feature_arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    """The rate destroys the classifier after its first epochs: the file holds the weights of the best one."""
    arrays = feature_arrays | {f"{a}_val": feature_arrays[f"{a}_test"] for a in "xy"}
    np.savez(tmp_path / "f.npz", **arrays)
    options = (
        "--methods plain --stage1-epochs 6 --stage2-epochs 0 --schedule step --lr-drops --lr 30 --keep best"
    )
    *epochs, result = run(tmp_path / "f.npz", tmp_path, *options.split())
    means = [epoch["mean_of_classes"] for epoch in epochs]
    best = max(range(6), key=lambda i: means[i])  # the first one of equal ones
    assert epochs[-1]["best_epoch"] == best + 1
    assert result["accuracy"] == epochs[best]["accuracy"]
    model, _ = load_model(tmp_path / "r" / "model-plain.safetensors")
    with torch.no_grad():
        predicted = model(torch.from_numpy(arrays["x_val"])).argmax(1)
    right = (predicted == torch.from_numpy(arrays["y_val"])).float()
    assert float(right.mean()) == pytest.approx(means[best])  # the classes have equally many samples


@pytest.mark.parametrize("stop", [1, 2])
def test_patience_ends_a_stage_and_a_resumed_run_ends_as_the_whole_one(
    stop: int, validated: Dataset, tmp_path: Path
) -> None:
    """A rate of almost zero makes no epoch better than the first. The mean of the features would move without a rate."""
    tiny = FEATURES.replace(
        center_features=False,
        lr=1e-30,
        stage1_epochs=5,
        stage2_epochs=3,
        keep="best",
        patience=2,
        ema_decay=0.5,
    )

    def train(trainer: Trainer, epochs: int | None = None) -> list[int]:
        ends = []
        while trainer.stage < len(trainer.method.stages):
            while not trainer._is_stage_over():
                if epochs == 0:
                    return ends
                for _ in range(trainer.steps_per_epoch):
                    trainer.step()
                trainer.end_epoch()
                trainer.best.update(trainer, trainer.evaluate())
                epochs = None if epochs is None else epochs - 1
            ends.append(trainer.epoch)
            trainer.begin_stage(trainer.stage + 1)
        return ends

    whole = Trainer("gist", tiny, validated)
    assert train(whole) == [3, 3]
    first = Trainer("gist", tiny, validated)
    train(first, stop)
    torch.save(first.state_dict(), tmp_path / "c.pt")
    second = Trainer("gist", tiny, validated)
    second.load_state_dict(torch.load(tmp_path / "c.pt", weights_only=True))
    train(second)
    assert equal(second.state_dict(), whole.state_dict())


def test_a_run_that_stops_early_has_fewer_epochs(
    feature_arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    arrays = feature_arrays | {f"{a}_val": feature_arrays[f"{a}_test"] for a in "xy"}
    np.savez(tmp_path / "f.npz", **arrays)
    options = "--no-center-features --methods cos-gist gist --stage1-epochs 4 --stage2-epochs 3 --lr 1e-20 --keep best --patience 1"
    records = run(tmp_path / "f.npz", tmp_path, *options.split(), "--num-displacements", "0")
    assert [(r["stage"], r["epoch"]) for r in records if r["event"] == "epoch"] == [
        (1, 1),
        (1, 2),
        (2, 1),
        (2, 2),
    ] * 2


def test_without_validation_samples_nothing_can_be_selected(features: Dataset, validated: Dataset) -> None:
    words = "--keep: expected last without a validation split, which --hold-out-val 0.1 makes, got 'best'"
    config = FEATURES.replace(keep="best")
    assert words in map(str, problems_of(config, features))
    assert words not in map(str, problems_of(config, validated))
    with pytest.raises(ConfigError, match="--keep: expected best, which --patience needs, got 'last'"):
        Config().replace(patience=3)


def test_the_estimates_count_the_copies(features: Dataset) -> None:
    trial = footprint.try_network(FEATURES, features, 2)
    config = FEATURES.replace(methods=("focal",))
    state = footprint.model_sizes("focal", config, features, trial)[1].state
    for options, copies in (({"ema_decay": 0.9}, 1), ({"ema_decay": 0.9, "keep": "best"}, 2)):
        more = config.replace(**options)
        memory = [footprint.fixed_memory("focal", c, features, trial) for c in (config, more)]
        disk = [footprint.disk_needed(c, features, trial) for c in (config, more)]
        assert (memory[1] - memory[0], disk[1] - disk[0]) == (copies * state, 2 * copies * state)
