"""The figures of README and the site: `python docs/figures.py` draws them into docs/figures/.

Figures with measurements read the tables of docs/performance.md and docs/results.md. Run the script again when these change.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parent
BLUE, ORANGE, GREEN, GRAY, INK = "#3b6fb6", "#d9822b", "#3f8f5f", "#9aa0a6", "#202124"
SIZE = "256×8142×2048"


def streams() -> Figure:
    """Two streams of samples, the parameters that each trains, and the gradients that are blocked."""
    figure, axes = blank(8, 3.6, (0, 16), (0, 7.2))

    def box(x: float, y: float, width: float, text: str, color: str) -> None:
        style = {
            "boxstyle": "round,pad=0.28",
            "facecolor": color + "22",
            "edgecolor": color,
            "linewidth": 1.4,
        }
        axes.add_patch(matplotlib.patches.FancyBboxPatch((x, y), width, 0.9, **style))
        axes.text(x + width / 2, y + 0.45, text, ha="center", va="center", fontsize=9, color=INK)

    for y, color, stream, centers, loss in (
        (5.6, BLUE, "random batch\nas in the data", "centers v\ndropped at the end", "$L_{random}$"),
        (0.7, ORANGE, "class-balanced batch\nas many of each class", "centers w\nkept", "$L_{balanced}$"),
    ):
        box(0.4, y, 3.3, stream, color)
        box(8.6, y, 2.9, centers, color)
        box(13.3, y, 2.2, loss, color)
        arrow(axes, (4.1, y + 0.45), (5.2, 3.6 + np.sign(y - 3) * 0.75), color)
        arrow(axes, (7.3, 3.6 + np.sign(y - 3) * 0.75), (8.2, y + 0.45), color)
        arrow(axes, (11.9, y + 0.45), (12.9, y + 0.45), color)
    box(5.0, 3.15, 2.5, "backbone\ntrained by both", GRAY)
    box(10.6, 3.15, 2.9, "displacements δ\nshared by all classes", GREEN)
    arrow(axes, (14.2, 5.2), (13.3, 4.45), BLUE)
    axes.text(14.1, 4.65, "gradient", fontsize=9, color=BLUE)
    arrow(axes, (14.2, 2.0), (13.3, 2.75), GRAY, dashed=True)
    axes.text(13.75, 2.37, "×", fontsize=20, color="#c5221f", ha="center", va="center")
    axes.text(14.2, 2.45, "blocked", fontsize=9, color="#c5221f")
    return figure


def constellation() -> Figure:
    """Two classes with the same displacements: the same shape at two places, and a feature with its nearest slot."""
    figure, axes = blank(5.6, 3.6, (-1.2, 9.4), (-1.0, 5.9))
    displacements = np.array([[1.3, 0.5], [0.3, 1.2], [-0.9, 0.7], [0.5, -0.9]])
    for number, center, color in (("1", np.array([2.0, 3.3]), BLUE), ("2", np.array([6.6, 1.6]), ORANGE)):
        for j, displacement in enumerate(displacements, 1):
            arrow(axes, tuple(center), tuple(center + displacement), color)
            axes.text(
                *(center + displacement * 1.24), f"$w_{number}+δ_{j}$", fontsize=9, ha="center", va="center"
            )
        axes.plot(*center, "o", color=color, markersize=9)
        axes.text(center[0] - 0.2, center[1] - 0.5, f"$w_{number}$", fontsize=12, ha="right", color=color)
    feature = np.array([8.0, 2.85])
    axes.plot(*feature, "*", color=INK, markersize=13)
    axes.text(feature[0] + 0.2, feature[1] + 0.2, "feature f", fontsize=10)
    axes.plot(*zip(feature, np.array([6.6, 1.6]) + displacements[0], strict=True), ":", color=INK)
    axes.text(
        4.1, -0.75, "all classes have the same four displacements", fontsize=10, ha="center", color=GREEN
    )
    return figure


def cancellation() -> Figure:
    """Logits of three classes with and without the best slot: all rise by the same amount, so the softmax is unchanged."""
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    classes, rise = np.arange(3), 0.9
    logits = np.array([2.0, 1.1, 0.4])
    left.bar(classes, logits, color=BLUE, label="f·w$_k$")
    left.bar(classes, rise, bottom=logits, color=GREEN, label="max$_j$ f·δ$_j$: equal in all classes")
    left.set_title("logits, where all ‖w$_k$ + δ$_j$‖ are equal", fontsize=10)
    left.set_ylim(0, 4.2)
    left.legend(fontsize=8, frameon=False, loc="upper right")
    for offset, values, color, label in (
        (-0.2, logits, BLUE, "without displacements"),
        (0.2, logits + rise, GREEN, "with displacements"),
    ):
        right.bar(classes + offset, np.exp(values) / np.exp(values).sum(), 0.38, color=color, label=label)
    right.set_title("softmax: the same", fontsize=10)
    right.set_ylim(0, 1)
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.set_xticks(classes, [f"class {k + 1}" for k in classes])
        tidy(axes)
    return figure


def speed() -> Figure:
    """Time of five slots over that of the linear layer, and memory of a step, from docs/performance.md."""
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    glance = page[page.index("| multiples of the linear layer's time") :]
    cpu, gpu, direct = (
        glance[glance.index(name) :] for name in ("**AMD", "**NVIDIA", "**written directly**")
    )
    kinds = {"forward": "forward", "step": "forward and backward", "loss": "loss and backward"}
    bars = [(f"CPU, float32: {kind}", number(cpu, f"{kinds[kind]}, float32", 3), BLUE) for kind in kinds]
    bars += [(f"GPU, bfloat16: {kind}", number(gpu, f"{kinds[kind]}, bfloat16", 3), GREEN) for kind in kinds]
    bars += [
        (f"plain PyTorch, CPU: {kind}", number(direct, f"{kinds[kind]}, float32", 3), ORANGE)
        for kind in ("forward", "step")
    ]
    figure = Figure(figsize=(8, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
    horizontal(left, bars, "{:.2g}")
    left.axvline(1, color=INK, linewidth=1)
    left.set_title("time, in multiples of a linear layer's", fontsize=10)
    labels = {"gistops": BLUE, "`F.linear`": GRAY, "written directly": ORANGE}
    memory = [
        (name.strip("`"), number(page, f"memory of a step: {name}", 3), color)
        for name, color in labels.items()
    ]
    horizontal(right, memory, "{:.0f} MiB")
    right.set_title("memory of a step, CPU", fontsize=10)
    figure.suptitle(f"{SIZE} (rows × classes × dimensions), logarithmic scales", fontsize=10)
    return figure


def accuracy() -> Figure:
    """Accuracy of the many-, medium- and few-shot classes by method, from the first table of docs/results.md."""
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    methods = {
        "plain softmax": GRAY,
        "balanced softmax": ORANGE,
        "cosine balanced softmax": BLUE,
        "GistNet (COS+CS+GIST)": GREEN,
    }
    figure = Figure(figsize=(8, 3.0), layout="constrained")
    axes = figure.subplots()
    groups = ("all classes", "many-shot", "medium-shot", "few-shot")
    for i, (method, color) in enumerate(methods.items()):
        values = [number(page, method, column) for column in range(1, 5)]
        places = np.arange(4) + (i - 1.5) * 0.2
        bars = axes.bar(places, values, 0.19, color=color, label=method.replace(" (COS+CS+GIST)", ""))
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(4), groups)
    axes.set_ylim(0, 80)
    axes.set_ylabel("test accuracy, %")
    axes.set_title("CIFAR-100-LT, imbalance 100, a head on features, three seeds", fontsize=10)
    axes.legend(fontsize=8, frameon=False, ncols=4, loc="upper center")
    tidy(axes)
    return figure


#: File -> the function that draws it.
FIGURES: dict[str, Callable[[], Figure]] = {
    "streams.svg": streams,
    "constellation.svg": constellation,
    "cancellation.svg": cancellation,
    "speed.svg": speed,
    "accuracy.svg": accuracy,
}


def number(text: str, row: str, column: int) -> float:
    """Return the first number of a cell of the first row of a markdown table that has this label."""
    found = re.search(rf"^\| {re.escape(row)} \|(.*)\|$", text, re.MULTILINE)
    assert found, f"no row {row!r}"
    cell = re.match(r"\s*([\d.]+)", found[1].split("|")[column - 1])
    assert cell, f"no number in column {column} of {found[0]!r}"
    return float(cell[1])


def blank(width: float, height: float, x: tuple[float, float], y: tuple[float, float]) -> tuple[Figure, Axes]:
    """Return a figure for a drawing, without axes."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=x, ylim=y)
    axes.axis("off")
    return figure, axes


def arrow(
    axes: Axes, start: tuple[float, ...], end: tuple[float, ...], color: str, dashed: bool = False
) -> None:
    """Draw an arrow."""
    style = {"arrowstyle": "-|>", "color": color, "linewidth": 1.5, "linestyle": "--" if dashed else "-"}
    axes.annotate("", end, start, arrowprops=style)


def horizontal(axes: Axes, bars: list[tuple[str, float, str]], form: str) -> None:
    """Draw labeled horizontal bars on a logarithmic axis, the first on top."""
    names, values, colors = zip(*bars, strict=True)
    drawn = axes.barh(names, values, color=colors)
    axes.bar_label(drawn, [form.format(value) for value in values], padding=3, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 2, max(values) * 3)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.set_xticks([])
    axes.minorticks_off()
    tidy(axes)


def tidy(axes: Axes) -> None:
    """Remove the frame above and on the right."""
    axes.spines[["top", "right"]].set_visible(False)


def draw(folder: Path) -> None:
    """Write all figures into a folder."""
    # Glyphs are drawn as paths, so that a figure looks the same everywhere; ids and dates would differ between runs.
    settings = {"svg.hashsalt": "gistops", "svg.fonttype": "path", "font.family": "DejaVu Sans"}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **settings}):
        for name, make in FIGURES.items():
            make().savefig(folder / name, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "figures")
