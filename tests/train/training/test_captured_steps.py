"""Steps that a CUDA graph captures: nothing is read on the host, copied from it, or of a size that depends on values.

Tensors without values (meta) stand for those of a GPU. Graphs themselves need a GPU; see test_gpu.py.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from train.data.dataset import Dataset
from train.methods import METHODS
from train.methods.method import Method
from train.training.trainer import Trainer

from ...ops.test_device import FromTheHost, OneDevice
from ..short_runs import IMAGES

META = torch.device("meta")
AUGMENTED = IMAGES.replace(
    accumulate=2, clip_gradient_norm=1.0, color_jitter=0.3, crop_padding=0, crop_scale=0.3, crop_size=8
)
#: Options that not all methods take.
ABILITIES: dict[str, dict[str, Any]] = {
    "mixes_labels": {"mixup": 0.5, "cutmix": 0.5},
    "smooths_labels": {"label_smoothing": 0.1},
    "transfers_features": {"transfer_directions": 5, "displacement_update": "residuals"},
}
CAPTURED = sorted(METHODS.keys() - {"lifted"})


def move_to_meta(trainer: Trainer) -> None:
    trainer.model.to(META)
    trainer.method.to(META)
    batches = trainer.batches
    batches.x, batches.y = batches.x.to(META), batches.y.to(META)
    trainer.loss_sums = {name: total.to(META) for name, total in trainer.loss_sums.items()}
    trainer.device = META
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    trainer.optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)  # torch has no fused steps on meta


def test_methods_say_whether_their_steps_can_be_captured(images: Dataset) -> None:
    methods = {name: make(IMAGES, images.train_counts) for name, make in METHODS.items()}
    assert sorted(name for name, method in methods.items() if method.capturable) == CAPTURED


@pytest.mark.parametrize("name", CAPTURED)
def test_a_step_can_be_captured(name: str, images: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AUGMENTED
    method: Method = METHODS[name](config, images.train_counts)
    for ability, options in ABILITIES.items():
        if getattr(method, ability, False):
            config = config.replace(**options)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # meta has none
    for stage in range(len(method.stages)):
        trainer = Trainer(name, config, images)
        for later in range(1, stage + 1):
            trainer.begin_stage(later)
        trainer.step()  # makes the sums of the losses
        draws = [draw.to(META) for draw in trainer.batches.next_draws()]
        move_to_meta(trainer)
        with META, FromTheHost(), OneDevice():
            loss = trainer.optimize([trainer.batches.materialize(draw) for draw in draws])
        assert loss.is_meta
