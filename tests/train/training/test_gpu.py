"""Training on a GPU: captured steps against eager ones, runs that resume, and models that move between a GPU and the CPU.

The last GPU is used: with several, it is not the current one.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train
from train.data.dataset import Dataset
from train.methods import METHODS
from train.model.model import save_model
from train.trained import describe
from train.training.checkpoint import load_trainer_file, save_trainer
from train.training.trainer import Trainer

from ..short_runs import IMAGES, finish

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
RUN = IMAGES.replace(device=f"cuda:{max(0, torch.cuda.device_count() - 1)}", batch_size=24)
ADAMW = {"optimizer": "adamw", "lr": 1e-3, "clip_gradient_norm": 1.0, "schedule": "cosine", "ema_decay": 0.9}
WAYS: list[dict[str, Any]] = [
    {},
    ADAMW,
    {"mixup": 0.5, "cutmix": 0.5, "label_smoothing": 0.1, "accumulate": 2},
    {"precision": "bf16", "crop_padding": 0, "crop_scale": 0.3, "crop_size": 8, "color_jitter": 0.3},
    {"shard_classes": True},
    ADAMW | {"shard_classes": True},
]


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def assert_same_way(a: Trainer, b: Trainer, start: Tensor) -> None:
    """Assert that two models have moved together: kernels may round, and add, differently."""
    moved, apart = (weights(b) - start).norm(), (weights(a) - weights(b)).norm()
    assert moved > 0
    assert apart < 0.1 * moved, (float(apart), float(moved))


@pytest.mark.parametrize("way", WAYS)
def test_captured_steps_are_the_eager_ones(way: dict[str, Any], images: Dataset) -> None:
    config = RUN.replace(**way)
    eager = Trainer("gist", config, images)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "--cuda-graph")  # a step that could not be captured
        captured = Trainer("gist", config.replace(cuda_graph=True), images)
        start = weights(captured)
        finish(eager, eager.steps_per_epoch - 1)
        finish(captured, captured.steps_per_epoch - 1)
    assert captured.graphed is not None
    assert captured.graphed.captured
    assert_same_way(captured, eager, start)


@pytest.mark.parametrize("way", [{}, ADAMW, ADAMW | {"shard_classes": True}])
@pytest.mark.parametrize("graphs", [(True, False), (False, True), (True, True)])
def test_a_run_resumes_with_and_without_graphs(
    graphs: tuple[bool, bool], way: dict[str, Any], images: Dataset, tmp_path: Path
) -> None:
    first, second = (Trainer("gist", RUN.replace(**way, cuda_graph=graph), images) for graph in graphs)
    finish(first, 5)
    save_trainer(tmp_path / "checkpoint.pt", first, {})
    second.load_state_dict(load_trainer_file(tmp_path / "checkpoint.pt")["training"])
    start = weights(second)
    assert torch.equal(start, weights(first))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "--cuda-graph")
        finish(first, 4)
        finish(second, 4)
    assert_same_way(second, first, start)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"lifted"}))
def test_a_model_has_the_same_scores_on_both_devices(name: str, images: Dataset, tmp_path: Path) -> None:
    config = RUN.replace(max_steps_per_epoch=2, stage2_epochs=1, crt_epochs=1)
    trainer = Trainer(name, config, images)
    finish(trainer)
    trainer.evaluate(final=True)
    file = tmp_path / "model.safetensors"
    save_model(file, trainer.model, images.class_names, describe(name, config, images))
    results = [
        train.load(file).to(device).evaluate(images.x_test, images.y_test)
        for device in ("cpu", config.runtime.resolved_device)
    ]
    torch.testing.assert_close(results[0].confidence, results[1].confidence, rtol=1e-2, atol=1e-2)
    assert results[0].record.keys() == results[1].record.keys()


def test_the_random_numbers_of_the_gpu_are_saved(images: Dataset) -> None:
    trainer = Trainer("fslwf", RUN, images)
    file = io.BytesIO()
    torch.save(trainer.state_dict(), file)
    drawn = torch.rand(8, device=trainer.device)
    trainer.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert torch.equal(drawn, torch.rand(8, device=trainer.device))
