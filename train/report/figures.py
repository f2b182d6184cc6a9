"""The report's pictures, each as PNG bytes."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findSystemFonts, fontManager, get_font_names

from ..shot_groups import GROUPS

Record = dict[str, Any]
Draw = Callable[[Axes], None]


def picture(draw: Draw, width: float = 6.0, height: float = 3.6, **axes: Any) -> bytes:
    """A figure of one pair of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    drawn = figure.add_subplot(**axes)
    draw(drawn)
    if drawn.get_legend_handles_labels()[0]:
        drawn.legend(prop={"family": ["sans-serif", *chinese_fonts()], "size": 8})
    drawn.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


#: Fonts that draw what matplotlib's own does not, as names of classes may be Chinese, and their files.
CHINESE = {"Noto Sans CJK JP": "NotoSansCJK-Regular.ttc", "WenQuanYi Micro Hei": "wqy-microhei.ttc"}


@functools.cache
def chinese_fonts() -> list[str]:
    """Those of the fonts that are installed."""
    if CHINESE.keys().isdisjoint(get_font_names()):
        for file in findSystemFonts():  # matplotlib keeps a list from when it was first used
            if Path(file).name in CHINESE.values():
                fontManager.addfont(file)
    return [name for name in CHINESE if name in get_font_names()]


def by_size(result: Record) -> list[tuple[float, float]]:
    """Means of training samples and of accuracies in %, over tenths of the classes from the largest to the smallest.

    So that 1000 classes can be read. Classes without test samples do not count.
    """
    pairs = zip(result["train_counts"], result["accuracy_per_class"], strict=True)
    tested = sorted(((count, a) for count, a in pairs if a is not None), key=lambda pair: -pair[0])
    n, num = len(tested), min(10, len(tested))
    parts = (tested[n * i // num : n * (i + 1) // num] for i in range(num))
    columns = (zip(*part, strict=True) for part in parts)
    return [(fmean(counts), 100 * fmean(accuracies)) for counts, accuracies in columns]


def accuracy_by_size(results: dict[str, Record]) -> bytes | None:
    """Each class's accuracy against its training samples, a colour a result; `results` are records by their names."""
    # Records of runs before this figure do not hold the counts.
    found = {name: result for name, result in results.items() if "train_counts" in result}
    if not found:
        return None

    def draw(axes: Axes) -> None:
        for number, (name, result) in enumerate(found.items()):
            colour, marker = f"C{number % 10}", "os^vD"[number % 5]
            label = f"{name}, overall {100 * result['accuracy']['overall']:.1f}"
            shares = [nan if value is None else 100 * value for value in result["accuracy_per_class"]]
            axes.scatter(result["train_counts"], shares, s=18, alpha=0.5, color=colour, marker=marker)
            axes.plot(*zip(*by_size(result), strict=True), color=colour, label=label)

    labels = {"xlabel": "training samples of the class", "ylabel": "test accuracy (%)"}
    return picture(draw, 7.0, 4.5, xscale="log", ylim=(-3, 103), **labels)


def passed(records: list[Record]) -> list[int]:
    """Image passes: the axis that all methods share."""
    return [record["images"] for record in records]


def losses(epochs: list[Record]) -> bytes:
    def draw(axes: Axes) -> None:
        for name in ("loss", "loss_balanced", "loss_random"):
            if name in epochs[0]:
                axes.plot(passed(epochs), [record[name] for record in epochs], label=name.replace("_", ", "))

    return picture(draw, xlabel="image passes", ylabel="training loss")


def accuracies(epochs: list[Record]) -> bytes:
    def draw(axes: Axes) -> None:
        found = [record for record in epochs if "accuracy" in record]
        for group in ("overall", *GROUPS):
            values = [record["accuracy"][group] for record in found]
            if None not in values:
                axes.plot(passed(found), [100 * value for value in values], marker=".", label=group)

    return picture(draw, xlabel="image passes", ylabel=f"{epochs[-1]['split']} accuracy (%)")


def usage(epochs: list[Record]) -> bytes | None:
    found = [record for record in epochs if len(record.get("slot_usage", [])) > 1]
    if not found:
        return None

    def draw(axes: Axes) -> None:
        shares = list(zip(*(record["slot_usage"] for record in found), strict=True))
        names = ["centre", *(f"δ{j}" for j in range(1, len(shares)))]
        axes.stackplot(passed(found), [[100 * s for s in share] for share in shares], labels=names, alpha=0.8)

    return picture(
        draw, xlabel="image passes", ylabel=f"{found[-1]['split']} samples won by a slot (%)", ylim=(0, 100)
    )


def constellation(epochs: list[Record]) -> bytes | None:
    """Lengths of centres and displacements, and the temperatures, over time."""
    found = [record for record in epochs if "mean_center_norm" in record]
    if not found:
        return None

    def draw(axes: Axes) -> None:
        axes.plot(
            passed(found), [record["mean_center_norm"] for record in found], label="mean ‖w‖", color="k"
        )
        for j in range(max(len(record["displacement_norms"]) for record in found)):
            moved = [record for record in found if len(record["displacement_norms"]) > j]
            axes.plot(passed(moved), [r["displacement_norms"][j] for r in moved], label=f"‖δ{j + 1}‖")
        other = axes.twinx()
        other.set_ylabel("τ (dotted)")
        for name in ("tau_balanced", "tau_random"):
            if name in found[0]:
                other.plot(passed(found), [record[name] for record in found], ":", color="grey")

    return picture(draw, xlabel="image passes", ylabel="length")


def reliability(found: Record) -> bytes:
    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], "--", color="grey", label="calibrated")
        x, y, _ = zip(*found["bins"], strict=True)
        axes.plot(x, y, marker="o", label=f"this model; expected error {100 * found['error']:.1f} %")

    return picture(draw, 4.2, 3.6, xlabel="confidence", ylabel="accuracy")


def feature_map(found: Record) -> bytes | None:
    """Test features in colour by class; centres as stars, displaced vectors as crosses, joined to their centre."""
    if not found["classes"]:
        return None

    def draw(axes: Axes) -> None:
        for number, name in enumerate(found["classes"]):
            colour = colormaps["tab10"](number % 10)
            x, y = zip(*[(x, y) for label, x, y in found["samples"] if label == name], strict=True)
            axes.scatter(x, y, s=8, alpha=0.5, color=colour, label=name)
            vectors = [(x, y) for label, _, x, y in found["vectors"] if label == name]
            if not vectors:
                continue
            (left, bottom), *others = vectors
            for right, top in others:
                axes.plot([left, right], [bottom, top], color=colour, linewidth=0.7)
                axes.scatter([right], [top], marker="x", color=[colour], s=30)
            axes.scatter([left], [bottom], marker="*", s=110, color=[colour], edgecolors="k", linewidths=0.5)
        axes.set_xticks([])
        axes.set_yticks([])

    return picture(draw, 7.0, 5.5)
