"""The weights that a stage ends with: the last ones, their average (--ema-decay), or those of the best epoch (--keep best)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..model.model import Model
from ..model.sharded_head import local

if TYPE_CHECKING:
    from .run_folder import Record
    from .trainer import Trainer


class BestEpoch:
    """The weights of the best evaluated epoch of a stage so far.

    Attributes:
        epoch: its number, from 1; 0 before the first evaluation.
        accuracy: the mean of the classes' accuracies in it.
        worse: the number of evaluations since.
        model: the state of the evaluated model.
    """

    def __init__(self) -> None:
        self.epoch, self.accuracy, self.worse = 0, -1.0, 0
        self.model: dict[str, Tensor] = {}

    def update(self, trainer: Trainer, record: Record) -> Record:
        """Take the weights of an epoch that has been evaluated, if it is the best one.

        Args:
            trainer: the trainer, after the epoch.
            record: the record of the evaluation.

        Returns:
            The number of the best epoch, as a record.
        """
        if record["mean_of_classes"] > self.accuracy:
            self.epoch, self.accuracy, self.worse = trainer.epoch, record["mean_of_classes"], 0
            state = trainer.evaluated_model.state_dict()
            self.model = {name: tensor.clone() for name, tensor in state.items()}
        else:
            self.worse += 1
        return {"best_epoch": self.epoch}

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class WeightAverage(AveragedModel):
    """An exponential average of a model's parameters and buffers, with a copy of the model.

    Integers and booleans, such as the indices of classes, are copied: rounding their average down would change them. The host
    does not wait for a GPU, which it does where torch copies the number of updates to the device.

    Args:
        model: the model.
        decay: the share of the average that an update keeps.
    """

    def __init__(self, model: Model, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        averaged: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for old, new in zip(_tensors(self.module), _tensors(model), strict=True):
            if self.n_averaged == 0 or not old.is_floating_point():  # n_averaged is on the CPU
                old.copy_(new)
                continue
            olds, news = averaged.setdefault(old.dtype, ([], []))
            olds.append(local(old))
            news.append(local(new))
        for olds, news in averaged.values():
            self._average(olds, news, 0)  # an exponential average does not depend on the number of updates
        self.n_averaged += 1


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())


def weight_average(model: Model, decay: float | None) -> WeightAverage | None:
    """Return an exponential average of a model's parameters and buffers, with a copy of the model; None without a decay."""
    return None if decay is None else WeightAverage(model, decay)


def end_stage(trainer: Trainer) -> None:
    """Give the model the weights that the stage ends with."""
    if trainer.best is not None and trainer.best.model:
        trainer.model.load_state_dict(trainer.best.model)
    elif trainer.average is not None:
        trainer.model.load_state_dict(trainer.average.module.state_dict())
    trainer.average = trainer.best = None
