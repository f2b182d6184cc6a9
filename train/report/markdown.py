"""The tables of an ablation in Markdown: means over seeds, in the paper's order and beside its figures where it has the rows."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import Config
from ..console import printable
from ..methods import TITLES
from ..options import label
from ..shot_groups import GROUPS
from .paper import Figures, PaperTable, dataset_of

Result = dict[str, Any]
Results = dict[str, dict[int, list[Result]]]  # label of a variant -> seed -> results of all methods

COLUMNS = ("overall", *GROUPS)


@dataclass
class Line:
    """A line of the table: a title, the results by seed, and the paper's figures."""

    title: str
    results: dict[int, Result] = field(default_factory=dict)
    figures: Figures = ()


def table(results: Results, config: Config, paper: PaperTable | None = None) -> str:
    """Return two Markdown tables: the methods with mean ± standard deviation of their accuracies over seeds and their mean
    slot usage, and other scores of the same trained models.

    Args:
        results: label of a variant -> seed -> results of all methods.
        config: the options that all runs share.
        paper: a table of the paper, whose rows come first and in its order.
    """
    runs = itertools.chain.from_iterable(by_seed.values() for by_seed in results.values())
    trained = list(itertools.chain.from_iterable(runs))
    seeds = list(dict.fromkeys(itertools.chain.from_iterable(results.values())))
    # Results of early versions have no counts.
    counts = next((result["train_counts"] for result in trained if "train_counts" in result), ())
    dataset = dataset_of(counts)
    lines = _lines(results, config, paper, dataset)
    for line in lines:
        if line.results and line.results.keys() != set(seeds):
            line.title += f", seeds {' '.join(map(str, line.results))} only"
    passes = {result["images"] for result in trained}
    caption = (
        f"Test accuracy in %, mean ± standard deviation over seeds {', '.join(map(str, seeds))}; "
        f"data {plain(Path(config.data.data).name)}, split rule {config.run.split_rule}"
        f"{f'; {passes.pop():,} image passes' if len(passes) == 1 else ''}."
    )
    notes = _notes(paper, counts, config) if paper else []
    parts = [caption, *notes, "", *_methods(lines, differ=len(passes) > 1)]
    if others := _other_scores(lines):
        parts += ["", "Other scores of the same models:", "", *others]
    return "\n".join(parts) + "\n"


def _lines(results: Results, config: Config, paper: PaperTable | None, dataset: str | None) -> list[Line]:
    """Return the lines of the paper's rows, and then those of all other results."""
    found: dict[tuple[str, str], Line] = {}
    for variant, by_seed in results.items():
        for seed, run in by_seed.items():
            for result in run:
                title = TITLES[result["method"]] + (variant and f", {plain(variant)}")
                line = found.setdefault((variant, result["method"]), Line(title))
                line.results[seed] = result
    lines = []
    for row in paper.rows if paper else ():
        line = found.pop((label(row.variant(config)), str(row.method)), Line(""))
        line.title, line.figures = row.shown_title(), row.figures.get(dataset or "", ())
        if line.results or line.figures:
            lines.append(line)
    return lines + list(found.values())


def _notes(paper: PaperTable, train_counts: Sequence[int], config: Config) -> list[str]:
    """Return sentences on the paper's figures, a line each.

    Args:
        paper: the table of the paper.
        train_counts: the number of training samples of each class; empty if it is not known.
        config: the options of the runs.
    """
    dataset, datasets = dataset_of(train_counts), paper.datasets()
    if dataset in datasets:
        note = paper.source(str(dataset))
    elif dataset:
        note = f"Paper: no figures for {dataset}: its Table {paper.number} is of {' and '.join(datasets)}."
    elif not train_counts:
        note = "Paper: no figures, because the records, of an early version, have no numbers of training samples per class."
    else:
        shares = {"--hold-out": config.data.hold_out, "--hold-out-val": config.data.hold_out_val}
        held_out = " and ".join(f"{option} {share:g}" for option, share in shares.items() if share)
        after = f", after {held_out}," if held_out else ""
        note = (
            f"Paper: no figures, because the numbers of training samples per class{after} are not those of {' or '.join(datasets)}, "
            f"the data of its Table {paper.number}."
        )
    return [note, *([paper.note] if paper.note else [])]


def _methods(lines: Sequence[Line], differ: bool) -> list[str]:
    """Return the table of the methods. A column without content is left out, as are image passes that do not differ."""
    rows = []
    for line in lines:
        results = list(line.results.values())
        passes = sorted({result["images"] for result in results})
        rows.append(
            accuracies([result["accuracy"] for result in results])
            | {
                "paper": " / ".join(f"{figure:.1f}" for figure in line.figures),
                "slot usage, %": usage(results),
                "image passes": ", ".join(f"{images:,}" for images in passes) if differ else "",
            }
        )
    return _markdown([line.title for line in lines], rows)


def _other_scores(lines: Sequence[Line]) -> list[str]:
    """Return the table of other scores of the trained models; an empty list if no model has any."""
    titles, rows = [], []
    for line in lines:
        names = dict.fromkeys(
            itertools.chain.from_iterable(r.get("accuracy_of", {}) for r in line.results.values())
        )
        for name in names:
            found = [
                r["accuracy_of"][name] for r in line.results.values() if name in r.get("accuracy_of", {})
            ]
            titles.append(f"{line.title}: {name}")
            rows.append(accuracies(found))
    return _markdown(titles, rows) if rows else []


def _markdown(titles: Sequence[str], rows: Sequence[dict[str, str]]) -> list[str]:
    """Return the lines of a table, without columns that are empty in all rows."""
    columns = [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    lines += [
        f"| {title} | {' | '.join(row[c] for c in columns)} |"
        for title, row in zip(titles, rows, strict=True)
    ]
    return lines


def accuracies(found: Sequence[dict[str, float | None]]) -> dict[str, str]:
    """Return the cells of accuracies, overall and by group; dashes if there are none."""
    return {name: spread([accuracy[name] for accuracy in found]) for name in COLUMNS}


def plain(name: str) -> str:
    """Return a name as plain text of a Markdown table. An underscore inside a word is no markup."""
    return re.sub(r"([\\`*|<\[$]|(?<!\w)_|_(?!\w))", r"\\\1", printable(name))


def spread(values: Sequence[float | None]) -> str:
    """Return the mean ± standard deviation of fractions, in percent; a dash if a fraction is missing or there are none."""
    mean, deviation = mean_and_deviation([None if value is None else 100 * value for value in values])
    if mean is None:
        return "–"
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"


def mean_and_deviation(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Return the mean and the standard deviation; None for both if a value is missing, and for the latter of one value."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None, None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def usage(found: Sequence[Result]) -> str:
    """Return the mean usage of each slot in percent, such as `26 / 23 / 18`; an empty text for methods with one slot."""
    shares = [result["slot_usage"] for result in found if len(result.get("slot_usage", [])) > 1]
    return " / ".join(f"{100 * statistics.fmean(s):.0f}" for s in zip(*shares, strict=True))
