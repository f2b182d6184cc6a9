"""The weights that a stage ends with: the last ones, their average (--ema-decay), or those of the best epoch (--keep best)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
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


def weight_average(model: Model, decay: float | None) -> AveragedModel | None:
    """Return an exponential average of a model's parameters and buffers, with a copy of the model; None without a decay.

    Integers and booleans, such as the indices of classes, are copied: rounding their average down would change them.
    """
    if decay is None:
        return None
    average = get_ema_multi_avg_fn(decay)

    def average_own_parts(
        averages: Sequence[Tensor], values: Sequence[Tensor], updates: Tensor | int
    ) -> None:
        if averages[0].is_floating_point():  # torch passes tensors of one dtype at a time
            average([local(x) for x in averages], [local(x) for x in values], updates)
        else:
            for copied, value in zip(averages, values, strict=True):
                copied.copy_(value)

    return AveragedModel(model, multi_avg_fn=average_own_parts, use_buffers=True)


def end_stage(trainer: Trainer) -> None:
    """Give the model the weights that the stage ends with."""
    if trainer.best is not None and trainer.best.model:
        trainer.model.load_state_dict(trainer.best.model)
    elif trainer.average is not None:
        trainer.model.load_state_dict(trainer.average.module.state_dict())
    trainer.average = trainer.best = None
