"""The files of an evaluation: the report page, the scores of each class, the confusion matrix, and the metrics."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..data.dataset import Dataset
from ..evaluated import Results, analysis_of
from ..files import csv_writer, write_atomically
from ..trained import TrainedModel
from .data_record import data_record
from .html import write_page

PAGE, CLASSES, CONFUSIONS, METRICS = FILES = ("report.html", "classes.csv", "confusion.csv", "metrics.json")


def metrics(results: Results, details: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of an evaluation in plain types: `details`, the record, means over the classes, and calibration.

    Means are over the classes with samples.
    """
    calibration = results.calibration
    bins = [dict(zip(("confidence", "accuracy", "samples"), row, strict=True)) for row in calibration["bins"]]
    names = ("precision", "recall", "f1")
    return {
        **details,
        "samples": len(results.predicted),
        **results.record,
        "mean_of_classes": {name: results.classes.mean(name) for name in names},
        "calibration": {"expected_calibration_error": calibration["error"], "bins": bins},
    }


def write_files(
    folder: Path,
    trained: TrainedModel,
    results: Results,
    details: dict[str, Any],
    data: Dataset,
    about: str,
) -> None:
    """Write all files, each as a whole.

    Args:
        folder: an existing folder.
        trained: the model.
        results: its evaluation.
        details: further entries of metrics.json.
        data: the evaluated samples, as `evaluated.as_dataset` returns them.
        about: the line below the page's heading.
    """
    text = json.dumps(metrics(results, details), indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / METRICS, lambda path: path.write_text(text, encoding="utf-8"))
    _write_csv(folder / CLASSES, _class_rows(trained, results))
    _write_csv(folder / CONFUSIONS, _confusion_rows(trained, results))
    # The record of a run that has this evaluation as its result, and whose training is not known.
    record = {"event": "result", **results.record, "analysis": analysis_of(trained, data, results)}
    facts = data_record(data, [record], name=details["data"], split_rule=trained.split_rule)
    records = {"evaluation": [facts, record]}
    write_atomically(folder / PAGE, lambda path: write_page(path, records, "Evaluation", about))


def _class_rows(trained: TrainedModel, results: Results) -> Iterable[list[object]]:
    """Yield a row per class. A score that is not defined is empty."""
    yield [
        *("class", "label", "group", "training_samples", "n"),
        *("precision", "recall", "f1", "taken_for", "times"),
    ]
    names, scores = trained.class_names, results.classes
    described = (names, trained.class_labels or names, trained.shot_groups, trained.train_counts.tolist())
    measured = (scores.n, scores.precision, scores.recall, scores.f1)
    taken_for = ("" if k is None else names[k] for k in scores.taken_for)
    for row in zip(*described, *measured, taken_for, scores.times, strict=True):
        yield ["" if cell is None else f"{cell:.6f}" if isinstance(cell, float) else cell for cell in row]


def _confusion_rows(trained: TrainedModel, results: Results) -> Iterable[list[object]]:
    """Yield a row per pair of classes that occurs."""
    yield ["true", "predicted", "count"]
    names, found = trained.class_names, results.confusions
    for true, predicted, count in zip(
        found.true.tolist(), found.predicted.tolist(), found.count.tolist(), strict=True
    ):
        yield [names[true], names[predicted], count]


def _write_csv(path: Path, rows: Iterable[list[object]]) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            csv_writer(file).writerows(rows)

    write_atomically(path, write)
