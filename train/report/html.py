"""`report.html`: a self-contained page on one run, or on several for comparison."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import jinja2

from ..methods import TITLES
from ..shot_groups import GROUPS
from ..training.run_folder import with_current_names
from . import figures
from .figures import Record
from .table import percent

TEMPLATE = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
    Path(__file__).with_name("page.html").read_text(encoding="utf-8")
)
CAPTIONS = {
    "accuracy by size": "Accuracy of each class over its number of training samples. Lines: means of tenths of the classes",
    "losses": "Training loss, mean of each epoch",
    "accuracies": "Accuracy on the validation split, or on the test split if there is none. Nothing is selected by it",
    "slot usage": "Share of samples that each slot of their own class wins; of about 1,000 samples after epochs without evaluation",
    "norms": "Norms of centers and displacements; temperatures",
    "reliability": "Calibration on the test split",
    "feature map": "t-SNE of unit test features. Stars: centers. Crosses: displaced centers",
}


def write_page(path: Path, runs: dict[str, list[Record]], title: str, about: str) -> None:
    """Write the page.

    Args:
        path: the file.
        runs: name of a run -> its records, as in metrics.jsonl. The "result" records may have an "analysis".
        title, about: the heading and the line below it, as plain text.
    """
    rows, sections, results = [], [], {}
    for run, records in runs.items():
        for result in (record for record in records if record["event"] == "result"):
            name = TITLES[result["method"]] if len(runs) == 1 else f"{run}: {TITLES[result['method']]}"
            results[name] = result
            accuracies = {name: result["accuracy"]}
            accuracies |= {f"{name}: {key}": value for key, value in result.get("accuracy_of", {}).items()}
            for key, accuracy in accuracies.items():
                cells = [percent(accuracy[column]) for column in ("overall", *GROUPS)]
                rows.append({"name": key, "cells": [*cells, f"{result['images']:,}"]})
            epochs = [r for r in records if r["event"] == "epoch" and r["method"] == result["method"]]
            sections.append({"name": name, **_section(epochs, result.get("analysis"))})
    overview = _embed({"accuracy by size": figures.accuracy_by_size(results)})
    html = TEMPLATE.render(
        title=title, about=about, groups=GROUPS, rows=rows, overview=overview, sections=sections
    )
    path.write_text(html, encoding="utf-8")


def _section(epochs: list[Record], analysis: Record | None) -> Record:
    plots = {
        "losses": figures.loss_curves(epochs),
        "accuracies": figures.accuracy_curves(epochs),
        "slot usage": figures.slot_usage(epochs),
        "norms": figures.norms_and_temperatures(epochs),
    }
    if analysis:
        plots["reliability"] = figures.reliability(analysis["calibration"])
        plots["feature map"] = figures.feature_map(analysis["map"])
    return {"figures": _embed(plots), "confusion": analysis["confusion"] if analysis else []}


def _embed(plots: dict[str, bytes | None]) -> list[Record]:
    return [
        {"caption": CAPTIONS[name], "data": base64.b64encode(png).decode()}
        for name, png in plots.items()
        if png
    ]


def read_records(folder: Path) -> list[Record]:
    """Read the records of a run's folder.

    Raises:
        OSError, ValueError: the folder has no metrics.jsonl, or it is damaged.
    """
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return with_current_names([json.loads(line) for line in lines])
