"""`report.html`: one page that needs nothing beside it, of one run, or of several beside one another."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import jinja2

from ..methods import TITLES
from ..shot_groups import GROUPS
from . import figures
from .figures import Record
from .table import percent

TEMPLATE = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
    Path(__file__).with_name("page.html").read_text(encoding="utf-8")
)

CAPTIONS = {
    "by_size": "Accuracy of each class by its training samples; lines: means over tenths of the classes",
    "losses": "Training loss, mean of an epoch",
    "accuracies": "Accuracy on the validation samples, or the test samples where there are none; nothing is chosen by it",
    "usage": "Share of samples that each vector of their own class won; of about a thousand, after epochs without evaluation",
    "constellation": "Lengths of centres and displacements, temperatures",
    "reliability": "Calibration on the test samples",
    "map": "t-SNE of unit test features; stars: centres, crosses: centre + displacement",
}


def write_page(path: Path, runs: dict[str, list[Record]], title: str, about: str) -> None:
    """Write the page.

    Args:
        path: the file.
        runs: name of a run -> its records, as in metrics.jsonl, the analyses of results among them.
        title, about: a heading and a line under it, as plain text.
    """
    rows, sections, results = [], [], {}
    for run, records in runs.items():
        for result in (record for record in records if record["event"] == "result"):
            name = TITLES[result["method"]] if len(runs) == 1 else f"{run}: {TITLES[result['method']]}"
            results[name] = result
            own = {name: result["accuracy"]}
            own |= {f"{name}: {key}": accuracy for key, accuracy in result.get("accuracy_of", {}).items()}
            for key, accuracy in own.items():
                cells = [percent(accuracy[column]) for column in ("overall", *GROUPS)]
                rows.append({"name": key, "cells": [*cells, f"{result['images']:,}"]})
            epochs = [r for r in records if r["event"] == "epoch" and r["method"] == result["method"]]
            sections.append({"name": name, **_section(epochs, result.get("analysis"))})
    overview = _embed({"by_size": figures.accuracy_by_size(results)})
    html = TEMPLATE.render(
        title=title, about=about, groups=GROUPS, rows=rows, overview=overview, sections=sections
    )
    path.write_text(html, encoding="utf-8")


def _section(epochs: list[Record], analysis: Record | None) -> Record:
    drawn = {
        "losses": figures.losses(epochs),
        "accuracies": figures.accuracies(epochs),
        "usage": figures.usage(epochs),
        "constellation": figures.constellation(epochs),
    }
    if analysis:
        drawn["reliability"] = figures.reliability(analysis["calibration"])
        drawn["map"] = figures.feature_map(analysis["map"])
    return {"figures": _embed(drawn), "confusion": analysis["confusion"] if analysis else []}


def _embed(drawn: dict[str, bytes | None]) -> list[Record]:
    return [
        {"caption": CAPTIONS[name], "data": base64.b64encode(png).decode()}
        for name, png in drawn.items()
        if png
    ]


def read_records(folder: Path) -> list[Record]:
    """The records of a run's folder.

    Raises:
        OSError, ValueError: there are none.
    """
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
