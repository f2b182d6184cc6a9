"""Options of short runs, and helpers to train and compare them."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from train.config import Config
from train.data.dataset import Dataset
from train.training.trainer import Trainer

IMAGES = Config().replace(backbone="resnet8-half", crop_padding=1, flip=True, batch_size=50, classes_per_batch=3, samples_per_class=4,
    stage1_epochs=1, stage2_epochs=2, lr=0.05, device="cpu", center_features=True,
)  # fmt: skip
FEATURES = IMAGES.replace(backbone="none", crop_padding=0, flip=False)


def finish(trainer: Trainer, steps: int | None = None) -> list[dict[str, Any]]:
    """Train to the end, or for `steps` steps; return the records of the finished epochs."""
    records: list[dict[str, Any]] = []
    while trainer.stage < len(trainer.method.stages):
        while trainer.epoch < trainer.method.stages[trainer.stage].epochs:
            while trainer.step_of_epoch < trainer.steps_per_epoch:
                if steps == 0:
                    return records
                trainer.step()
                steps = None if steps is None else steps - 1
            records.append(trainer.end_epoch())
        trainer.begin_stage(trainer.stage + 1)
    return records


def equal(a: Any, b: Any) -> bool:
    """Return whether two nested states are bitwise equal."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def check_resuming(method: str, config: Config, data: Dataset, steps: int) -> Trainer:
    """Assert that a run that stops after some steps continues to the same bits; return the trainer of the whole run."""
    whole = Trainer(method, config, data)
    expected = finish(whole)
    first = Trainer(method, config, data)
    records = finish(first, steps)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    second = Trainer(method, config, data)
    torch.rand(3)  # nothing but the saved state may count
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert records + finish(second) == expected
    assert equal(second.state_dict(), whole.state_dict())
    return whole
