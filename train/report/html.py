"""`report.html`: one page that needs nothing beside it, of one run, or of several beside one another."""

from __future__ import annotations

import argparse
import base64
import json
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console

from ..config import ConfigError
from ..console import say
from ..files import write_atomically
from ..methods import TITLES
from ..shot_groups import GROUPS
from . import figures
from .table import percent

Record = dict[str, Any]

PAGE = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string("""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .7rem; border-bottom: 1px solid #ddd }
td + td, th + th { text-align: right } td.words { text-align: left }
figure { display: inline-block; margin: .5rem; vertical-align: top } figcaption { font-size: 13px; color: #555 }
</style>
<h1>{{ title }}</h1>
<p>{{ about }}</p>
<table><tr><th></th><th>overall</th>{% for g in groups %}<th>{{ g }}</th>{% endfor %}<th>image passes</th></tr>
{% for row in rows %}<tr><td>{{ row.name }}</td>{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% macro show(figures) %}{% for f in figures %}<figure><img src="data:image/png;base64,{{ f.data }}" alt="{{ f.caption }}">
<figcaption>{{ f.caption }}</figcaption></figure>{% endfor %}{% endmacro %}
{{ show(overview) }}
{% for section in sections %}
<h2>{{ section.name }}</h2>
{{ show(section.figures) }}
{% if section.confusion %}<h3>Few-shot classes, and what their test samples are taken for</h3>
<table><tr><th>class</th><th>training samples</th><th>accuracy</th><th>taken for</th></tr>
{% for row in section.confusion %}<tr><td>{{ row['class'] }}</td><td>{{ row.training }}</td>
<td>{{ '%.0f' % (100 * row.accuracy) }} %</td><td class="words">{% for name, share in row['taken for'] %}{{ name }}
{{ '%.0f' % (100 * share) }} %{{ '' if loop.last else ', ' }}{% endfor %}</td></tr>
{% endfor %}</table>{% endif %}
{% endfor %}
</html>
""")

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
    html = PAGE.render(
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


def compare(args: list[str], console: Console) -> int:
    """`python -m train report RUN [RUN …] --out FILE`: several runs' folders in one page.

    Raises:
        ConfigError: a folder that is no run's.
    """
    parser = argparse.ArgumentParser(prog="python -m train report", description=compare.__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="runs' folders, such as runs/smoke")
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), help="the page (default: report.html)"
    )
    options = parser.parse_args(args)
    runs: dict[str, list[Record]] = {}
    for folder in options.folders:
        try:
            runs[str(folder)] = read_records(folder)
        except (OSError, ValueError) as error:
            raise ConfigError("folders", "the folders of runs", f"{folder} ({error})") from None
        if not any(record["event"] == "result" for record in runs[str(folder)]):
            raise ConfigError("folders", "runs that are finished", str(folder))
    about = "Runs: " + ", ".join(runs) + "."
    if not options.out.absolute().parent.is_dir():
        raise ConfigError("out", "a file in a folder that is there", str(options.out))
    write_atomically(options.out, lambda path: write_page(path, runs, "Comparison", about))
    say(console, f"written to {options.out}")
    return 0
