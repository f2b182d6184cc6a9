"""The estimate of memory and disk space, beside the model, gradients, momentum and file of a training."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import pytest
import torch

from train import footprint
from train.__main__ import main
from train.cli import parse_run
from train.config import Config
from train.data.dataset import Dataset
from train.methods import METHODS
from train.model.model import read_model_file, save_model
from train.training.first_stages import FirstStages
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


def test_processes_share_the_classes_of_the_head(images: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = footprint.try_network(CONFIG, images, 2)
    whole, shared = (footprint.model_sizes("gist", CONFIG, images, trial, shards) for shards in (1, 3))
    saved = (
        2 * 3 * 4 * trial.features
    )  # of five rows of two heads in float32, three; the largest part has two
    for before, after in zip(whole, shared, strict=True):
        assert (before.state - after.state, before.trained - after.trained) == (saved, saved)
    config = CONFIG.replace(shard_classes=True)
    alone = footprint.fixed_memory("gist", config, images, trial)
    monkeypatch.setattr(footprint.distributed, "world_size", lambda: 3)
    assert alone - footprint.fixed_memory("gist", config, images, trial) == 3 * saved
    assert footprint.fixed_memory("gist", CONFIG, images, trial) == alone


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
    focal, oltr = (
        footprint.disk_needed(CONFIG.replace(methods=(name,)), images, trial) for name in ("focal", "oltr")
    )
    assert oltr - focal == (2 * 2 + 1) * extra  # two checkpoints with momentum, and the model


def test_the_files_of_a_run_have_the_estimated_size(
    image_file: Path, images: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FirstStages, "clear", lambda stages: None)  # it removes them at the end of a run
    methods = ("cos-cb", "cos-cs-cb", "cos-gist", "gist", "plain")
    words = f"--recipe smoke --data {image_file} --num-classes 5 --classes-per-batch 3 --device cpu --runs {tmp_path} --name r"
    words += " --max-steps-per-epoch 1 --methods"
    assert main([*words.split(), *methods]) == 0
    folder, config = tmp_path / "r", parse_run([*words.split(), *methods])
    trial = footprint.try_network(config, images, 2)
    models = [file.stat().st_size for file in folder.glob("model-*")]
    first = [file.stat().st_size for file in (folder / "first-stages").iterdir()]
    assert (len(models), len(first)) == (5, 2)
    files = sum(models) + sum(first) + 2 * (folder / "checkpoint.pt").stat().st_size
    # Beside the tensors of the models, files hold names, records and the state of random generators.
    needed = footprint.disk_needed(config, images, trial)
    assert 0.95 * files < needed < files
    plain, _ = footprint.model_sizes("plain", config, images, trial)  # other runs may need its first stage
    shared = footprint.disk_needed(config, images, trial, shared=True)
    assert shared - needed == plain.state + plain.trained


def peak_of_step(config: Config, data: Dataset) -> int:
    """Return the largest number of bytes that a step allocates at once; of three, as threads may free some a little earlier."""
    trainer = Trainer("plain", config, data)
    trainer.step()  # allocates gradients and momentum
    gc.collect()  # memory of other trainers that is freed in the step would count against its own
    with torch.profiler.profile(profile_memory=True) as profile:
        for _ in range(3):
            trainer.step()
    events = profile.profiler.kineto_results.events()
    return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def test_the_estimate_counts_the_images_of_all_micro_batches() -> None:
    x, y = torch.randint(256, (240, 3, 32, 32), dtype=torch.uint8), torch.arange(240) % 5
    data = Dataset(x, y, x[:5], y[:5], list("abcde"), torch.bincount(y))
    moved = CONFIG.replace(batch_size=60, accumulate=4)
    trial = footprint.try_network(moved, data, 2)
    for options in ({"crop_scale": 0.5}, {"color_jitter": 0.3}, {"cutmix": 1.0}, {"mixup": 0.4}):
        computed = moved.replace(**options)
        estimates = [footprint.memory_needed("plain", config, data, trial) for config in (moved, computed)]
        micro_batches = Trainer("plain", computed, data).batches.next()
        more = sum(batch.x.nbytes - batch.x.numel() for batch in micro_batches)
        assert estimates[1] - estimates[0] == more == 3 * (60 + 12) * 3 * 32 * 32
    assert peak_of_step(computed, data) - peak_of_step(moved, data) == pytest.approx(more, rel=0.1)


def test_an_estimate_takes_no_random_numbers(images: Dataset) -> None:
    trial = footprint.try_network(CONFIG, images, 2)
    before = torch.get_rng_state()
    for name in METHODS:
        footprint.model_sizes(name, CONFIG, images, trial)
    assert torch.equal(torch.get_rng_state(), before)
