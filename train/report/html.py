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
from ..shot_groups import GROUPS
from ..training.run_folder import with_current_names
from . import figures, names
from .class_table import class_tables
from .data_record import read_data_record
from .differences import standard_error
from .figures import Record
from .summary import summarize
from .table import percent
from .trained import TrainedMethod, trained_methods


def _plain(value: Any) -> Any:
    """Return a value of the template; a text without control characters. jinja2 escapes the text afterward."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


TEMPLATE = jinja2.Environment(
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=_plain,
    trim_blocks=True,
    lstrip_blocks=True,
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("page")),
).get_template("page.html")
CAPTIONS = {
    "accuracy by class size": "Accuracy of each class over its number of training samples. Lines: means of tenths of the classes",
    "losses": "Training loss, mean of each epoch",
    "accuracies": "Accuracy after evaluated epochs, of all samples and as the mean of the classes of each group",
    "slot usage": "Share of samples that each slot of their own class wins; of about 1,000 samples after epochs without evaluation",
    "norms": "Norms of centers w and displacements δ, and temperatures τ",
    "reliability": "Calibration on the test split: accuracy over the predicted probability. Below the dashed line the model is too confident",
    "feature map": "Map of test samples: those that the network finds alike are close (t-SNE of unit features). Stars: centers. Crosses: displaced centers",
}


def write_page(path: Path, runs: dict[str, list[Record]], title: str, about: str) -> None:
    """Write the page.

    Args:
        path: the file.
        runs: name of a run -> its records, as `read_records` returns them: those of metrics.jsonl, where "result" records
            may have an "analysis", and the "data" record of data_record.py, without which the page has no class names
            and no images.
        title, about: the heading and the line below it, as plain text.
    """
    methods = trained_methods(runs)
    overview = _embed({"accuracy by class size": lambda: figures.accuracy_by_size(_results(methods))})
    if overview and (numbers := names.explanation([method.name for method in methods])):
        overview[0]["caption"] += f". {numbers}"
    html = TEMPLATE.render(
        title=title,
        about=about,
        summary=summarize(methods) if methods else None,
        groups=GROUPS,
        has_images=any(method.result.get("images") for method in methods),
        rows=[_row(method.name, method.result, method.result["accuracy"]) for method in methods],
        others=[
            _row(f"{method.name}: {way}", method.result, accuracy)
            for method in methods
            for way, accuracy in method.result.get("accuracy_of", {}).items()
        ],
        overview=overview,
        sections=[_section(method) for method in methods],
        tables=class_tables(methods),
    )
    path.write_text(html, encoding="utf-8")


def _results(methods: list[TrainedMethod]) -> dict[str, Record]:
    return {method.name: method.result for method in methods}


def _row(name: str, result: Record, accuracy: Record) -> Record:
    error = standard_error(result | {"accuracy": accuracy})
    return {
        "name": name,
        "overall": percent(accuracy["overall"]),
        "error": "" if error is None else f"±{100 * error:.1f}",
        "groups": [percent(accuracy[group]) for group in GROUPS],
        "images": f"{result['images']:,}" if result.get("images") else "–",
    }


def _section(method: TrainedMethod) -> Record:
    epochs, analysis = method.epochs, method.result.get("analysis")
    section: Record = {"name": method.name, "confusion": [], "pairs": []}
    plots: dict[str, Callable[[], bytes | None]] = {}
    if epochs:  # none if a trained model is evaluated
        plots = {
            "losses": lambda: figures.loss_curves(epochs),
            "accuracies": lambda: figures.accuracy_curves(epochs),
            "slot usage": lambda: figures.slot_usage(epochs),
            "norms": lambda: figures.norms_and_temperatures(epochs),
        }
    if not analysis:
        return section | {"figures": _embed(plots)}
    plots["reliability"] = lambda: figures.reliability(analysis["calibration"])
    plots["feature map"] = lambda: figures.feature_map(analysis["map"])
    drawn = _embed(plots)
    if numbers := names.explanation(analysis["map"]["classes"]):
        drawn[-1]["caption"] += f". {numbers}"
    return section | {"figures": drawn, "confusion": analysis["confusion"], "pairs": _pairs(method)}


def _pairs(method: TrainedMethod) -> list[Record]:
    """Return the images of the method's most frequent confusions, with the names of both classes."""
    pairs = method.data.get("pairs", {}).get(method.result["method"], [])
    class_names = method.data.get("class_names", [])
    return [
        {
            "class": class_names[pair["class"]],
            "other": class_names[pair["taken for"]],
            "count": pair["count"],
            "of": pair["of"],
            "image": pair["image"],
            "other_image": pair["other image"],
        }
        for pair in pairs
    ]


def _embed(plots: dict[str, Callable[[], bytes | None]]) -> list[Record]:
    """Draw the figures. A figure that cannot be drawn is a sentence, because it must not end a run that is trained."""
    embedded = []
    for name, draw in plots.items():
        try:
            png = draw()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            embedded.append({"name": name, "caption": f"{CAPTIONS[name]}. Not drawn: {why}", "data": ""})
            continue
        if png:
            embedded.append({"name": name, "caption": CAPTIONS[name], "data": base64.b64encode(png).decode()})
    return embedded


def read_records(folder: Path) -> list[Record]:
    """Read the records of a run's folder: those of metrics.jsonl and the record of the data.

    Raises:
        OSError, ValueError: the folder has no metrics.jsonl, or a file is damaged.
    """
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return with_current_names([json.loads(line) for line in lines]) + read_data_record(folder)
