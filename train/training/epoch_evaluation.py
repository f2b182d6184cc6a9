"""The evaluation of a trainer's model after an epoch, as a record."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..evaluation.evaluate import details_of, record_of
from ..evaluation.evaluate import evaluate as evaluate_model

if TYPE_CHECKING:
    from .run_folder import Record
    from .trainer import Trainer


def evaluate(trainer: Trainer, final: bool) -> Record:
    """Evaluate on the validation split; on the test split if there is none, or if `final`. Return the accuracies."""
    data, rule = trainer.data, trainer.config.run.split_rule
    split, x, y = ("test", data.x_test, data.y_test) if final else data.eval_split
    method = trainer.method
    result, alternatives = evaluate_model(
        trainer.evaluated_model,
        x,
        y,
        data.num_classes,
        method.alternative_scores,
        alternative_predictions=method.alternative_predictions,
    )
    record: Record = {"split": split} | record_of(result, alternatives, data.train_counts, rule)
    if trainer.best is not None and not final:
        tested = [accuracy for accuracy in result.per_class() if accuracy is not None]
        record["mean_of_classes"] = sum(tested) / len(tested)
    return record | details_of(result, data.train_counts) if final else record


def slot_usage(trainer: Trainer) -> Record:
    """Return the slot usage on about a thousand evaluation samples, for epochs without an evaluation."""
    if not getattr(trainer.model.head, "num_displacements", 0):
        return {}
    _, x, y = trainer.data.eval_split
    every = max(1, len(y) // 1000)
    result, _ = evaluate_model(trainer.evaluated_model, x[::every], y[::every], trainer.data.num_classes)
    return {} if result.slot_usage is None else {"slot_usage": result.slot_usage.tolist()}
