"""`report.html`: a self-contained page on one run, or on several for comparison."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..console import printable
from ..methods import TITLES
from ..shot_groups import GROUPS
from ..training.run_folder import with_current_names
from . import figures, names
from .figures import Record
from .table import percent


def _plain(value: Any) -> Any:
    """Return a value of the template; a text without control characters. jinja2 escapes the text afterward."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


TEMPLATE = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=_plain).from_string(
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
    rows: list[Record] = []
    others: list[Record] = []
    sections: list[Record] = []
    results: dict[str, Record] = {}
    for run, records in runs.items():
        for result in (record for record in records if record["event"] == "result"):
            name = TITLES[result["method"]] if len(runs) == 1 else f"{run}: {TITLES[result['method']]}"
            results[name] = result
            rows.append(_row(name, result["accuracy"], result["images"]))
            for key, accuracy in result.get("accuracy_of", {}).items():
                others.append(_row(f"{name}: {key}", accuracy, result["images"]))
            epochs = [r for r in records if r["event"] == "epoch" and r["method"] == result["method"]]
            sections.append({"name": name, **_section(epochs, result.get("analysis"))})
    overview = _embed({"accuracy by size": lambda: figures.accuracy_by_size(results)})
    if overview and (numbers := names.explanation(list(results))):
        overview[0]["caption"] += f". {numbers}"
    html = TEMPLATE.render(
        title=title, about=about, groups=GROUPS, rows=rows + others, overview=overview, sections=sections
    )
    path.write_text(html, encoding="utf-8")


def _row(name: str, accuracy: Record, images: int) -> Record:
    return {"name": name, "cells": [*(percent(accuracy[c]) for c in ("overall", *GROUPS)), f"{images:,}"]}


def _section(epochs: list[Record], analysis: Record | None) -> Record:
    plots: dict[str, Callable[[], bytes | None]] = {
        "losses": lambda: figures.loss_curves(epochs),
        "accuracies": lambda: figures.accuracy_curves(epochs),
        "slot usage": lambda: figures.slot_usage(epochs),
        "norms": lambda: figures.norms_and_temperatures(epochs),
    }
    if not analysis:
        return {"figures": _embed(plots), "confusion": []}
    plots["reliability"] = lambda: figures.reliability(analysis["calibration"])
    plots["feature map"] = lambda: figures.feature_map(analysis["map"])
    drawn = _embed(plots)
    if numbers := names.explanation(analysis["map"]["classes"]):
        drawn[-1]["caption"] += f". {numbers}"
    return {"figures": drawn, "confusion": analysis["confusion"]}


def _embed(plots: dict[str, Callable[[], bytes | None]]) -> list[Record]:
    """Draw the figures. A figure that cannot be drawn is a sentence, because it must not end a run that is trained."""
    embedded = []
    for name, draw in plots.items():
        try:
            png = draw()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            embedded.append({"caption": f"{CAPTIONS[name]}. Not drawn: {why}", "data": ""})
            continue
        if png:
            embedded.append({"caption": CAPTIONS[name], "data": base64.b64encode(png).decode()})
    return embedded


def read_records(folder: Path) -> list[Record]:
    """Read the records of a run's folder.

    Raises:
        OSError, ValueError: the folder has no metrics.jsonl, or it is damaged.
    """
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return with_current_names([json.loads(line) for line in lines])
