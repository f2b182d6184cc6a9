"""The report's figures, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Callable
from math import nan
from statistics import fmean
from typing import Any

from matplotlib import colormaps, rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..shot_groups import GROUPS
from . import names

Record = dict[str, Any]


def render(draw: Callable[[Axes], None], width: float = 6.0, height: float = 3.6, **axes: Any) -> bytes:
    """Render a figure with one pair of axes, on which `draw` plots. Labels of the legend are plain text, not formulas."""
    with rc_context({"text.usetex": False}):
        figure = Figure(figsize=(width, height), layout="constrained")
        subplot = figure.add_subplot(**axes)
        draw(subplot)
        if labels := subplot.get_legend_handles_labels()[1]:
            extra = names.families("".join(labels).replace(names.GUARD, ""))
            legend = subplot.legend(prop={"family": [*rcParams["font.family"], *extra], "size": 8})
            for text in legend.get_texts():
                text.set_parse_math(False)
                text.set_text(text.get_text().removeprefix(names.GUARD))
        subplot.grid(alpha=0.3)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


def mean_accuracy_by_size(result: Record) -> list[tuple[float, float]]:
    """Return the mean number of training samples and the mean accuracy in % of each tenth of the classes.

    The tenths are ordered from the largest classes to the smallest. Means keep a figure of 1,000 classes readable.
    Classes without test samples are left out.
    """
    pairs = zip(result["train_counts"], result["accuracy_per_class"], strict=True)
    tested = sorted(((count, a) for count, a in pairs if a is not None), key=lambda pair: -pair[0])
    n, num = len(tested), min(10, len(tested))
    tenths = (tested[n * i // num : n * (i + 1) // num] for i in range(num))
    columns = (zip(*tenth, strict=True) for tenth in tenths)
    return [(fmean(counts), 100 * fmean(accuracies)) for counts, accuracies in columns]


def accuracy_by_size(results: dict[str, Record]) -> bytes | None:
    """Plot each class's accuracy over its number of training samples, one color per result."""
    # Results of early versions have no counts.
    counted = {name: result for name, result in results.items() if "train_counts" in result}
    if not counted:
        return None

    def draw(axes: Axes) -> None:
        for number, (name, result) in enumerate(
            zip(names.labels(list(counted)), counted.values(), strict=True)
        ):
            color, marker = f"C{number % 10}", "os^vD"[number % 5]
            label = f"{name}, overall {100 * result['accuracy']['overall']:.1f}"
            accuracies = [nan if value is None else 100 * value for value in result["accuracy_per_class"]]
            axes.scatter(result["train_counts"], accuracies, s=18, alpha=0.5, color=color, marker=marker)
            axes.plot(*zip(*mean_accuracy_by_size(result), strict=True), color=color, label=label)

    labels = {"xlabel": "training samples of the class", "ylabel": "test accuracy (%)"}
    return render(draw, 7.0, 4.5, xscale="log", ylim=(-3, 103), **labels)


def image_passes(records: list[Record]) -> list[int]:
    """Return the records' image passes, the horizontal axis that all methods share."""
    return [record["images"] for record in records]


def loss_curves(epochs: list[Record]) -> bytes:
    """Plot the training losses."""

    def draw(axes: Axes) -> None:
        for name in ("loss", "loss_balanced", "loss_random"):
            if name in epochs[0]:
                losses = [record[name] for record in epochs]
                axes.plot(image_passes(epochs), losses, label=name.replace("_", ", "))

    return render(draw, xlabel="image passes", ylabel="training loss")


def accuracy_curves(epochs: list[Record]) -> bytes:
    """Plot the accuracies of evaluated epochs: overall, and of each group of classes."""

    def draw(axes: Axes) -> None:
        evaluated = [record for record in epochs if "accuracy" in record]
        for group in ("overall", *GROUPS):
            values = [record["accuracy"][group] for record in evaluated]
            if None not in values:
                percent = [100 * value for value in values]
                axes.plot(image_passes(evaluated), percent, marker=".", label=group)

    return render(draw, xlabel="image passes", ylabel=f"{epochs[-1]['split']} accuracy (%)")


def slot_usage(epochs: list[Record]) -> bytes | None:
    """Plot the share of samples that each slot wins; None for a head with one slot."""
    epochs = [record for record in epochs if len(record.get("slot_usage", [])) > 1]
    if not epochs:
        return None

    def draw(axes: Axes) -> None:
        usage = list(zip(*(record["slot_usage"] for record in epochs), strict=True))
        slots = ["center", *(f"δ{j}" for j in range(1, len(usage)))]
        percent = [[100 * share for share in slot] for slot in usage]
        axes.stackplot(image_passes(epochs), percent, labels=slots, alpha=0.8)

    ylabel = f"{epochs[-1]['split']} samples won by each slot (%)"
    return render(draw, xlabel="image passes", ylabel=ylabel, ylim=(0, 100))


def norms_and_temperatures(epochs: list[Record]) -> bytes | None:
    """Plot the norms of centers and displacements, and the temperatures; None for a head without centers."""
    epochs = [record for record in epochs if "mean_center_norm" in record]
    if not epochs:
        return None

    def draw(axes: Axes) -> None:
        norms = [record["mean_center_norm"] for record in epochs]
        axes.plot(image_passes(epochs), norms, label="mean ‖w‖", color="k")
        for j in range(max(len(record["displacement_norms"]) for record in epochs)):
            displaced = [record for record in epochs if len(record["displacement_norms"]) > j]
            norms = [record["displacement_norms"][j] for record in displaced]
            axes.plot(image_passes(displaced), norms, label=f"‖δ{j + 1}‖")
        right = axes.twinx()
        right.set_ylabel("τ (dotted)")
        for name in ("tau_balanced", "tau_random"):
            if name in epochs[0]:
                right.plot(image_passes(epochs), [record[name] for record in epochs], ":", color="gray")

    return render(draw, xlabel="image passes", ylabel="norm")


def reliability(calibration: Record) -> bytes:
    """Plot accuracy over confidence, as `evaluation.analysis.calibration` returns them."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], "--", color="gray", label="calibrated")
        confidence, accuracy, _ = zip(*calibration["bins"], strict=True)
        label = f"this model; expected calibration error {100 * calibration['error']:.1f} %"
        axes.plot(confidence, accuracy, marker="o", label=label)

    return render(draw, 6.0, 4.7, xlabel="confidence", ylabel="accuracy")


def feature_map(mapped: Record) -> bytes | None:
    """Plot test features in the color of their class, and its constellation, as `evaluation.analysis.feature_map` does.

    Centers are stars. Displaced centers are crosses, joined to their center by a line.
    """
    if not mapped["classes"]:
        return None

    def draw(axes: Axes) -> None:
        shown = names.labels(mapped["classes"])
        for number, (name, label) in enumerate(zip(mapped["classes"], shown, strict=True)):
            color = colormaps["tab10"](number % 10)
            x, y = zip(*[(x, y) for owner, x, y in mapped["samples"] if owner == name], strict=True)
            axes.scatter(x, y, s=8, alpha=0.5, color=color, label=label)
            vectors = [(x, y) for owner, _, x, y in mapped["vectors"] if owner == name]
            if not vectors:
                continue
            (left, bottom), *displaced = vectors
            for right, top in displaced:
                axes.plot([left, right], [bottom, top], color=color, linewidth=0.7)
                axes.scatter([right], [top], marker="x", color=[color], s=30)
            axes.scatter([left], [bottom], marker="*", s=110, color=[color], edgecolors="k", linewidths=0.5)
        axes.set_xticks([])
        axes.set_yticks([])

    return render(draw, 6.0, 4.7)
