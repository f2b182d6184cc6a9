"""The summary that a run prints: a table of accuracies, and a line on each constellation."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..console import counted
from ..methods import TITLES
from ..shot_groups import GROUPS, split_classes


def percent(value: float | None) -> str:
    """Return a share as a percentage with one decimal, or a dash for None."""
    return "–" if value is None else f"{100 * value:.1f}"


def print_results(console: Console, results: list[dict[str, Any]], train_counts: Tensor, rule: str) -> None:
    """Print the table: the methods, then other scores of the same models. Below it, print the slot usage, the temperatures and
    the norms of the displacements of heads with slots. A model that is evaluated later has no number of image passes, and may
    have a title other than the method's."""
    sizes = {
        group: counted(int(mask.sum()), "class", "classes")
        for group, mask in split_classes(train_counts, rule).items()
    }
    passes = {result["images"] for result in results if "images" in result}
    differ = len(passes) > 1
    shared = f"; {passes.pop():,} image passes" if len(passes) == 1 else ""
    table = Table(title=f"Test accuracy in %, split rule {rule}{shared}")
    table.add_column("", no_wrap=True)
    table.add_column(f"overall\n{counted(len(train_counts), 'class', 'classes')}", justify="right")
    for group in GROUPS:
        table.add_column(f"{group}\n{sizes[group]}", justify="right")
    if differ:
        table.add_column("image\npasses", justify="right")

    def add_row(name: str, accuracy: dict[str, float | None], *more: str) -> None:
        table.add_row(name, *(percent(accuracy[column]) for column in ("overall", *GROUPS)), *more)

    for result in results:
        more = (f"{result['images']:,}",) if differ else ()
        add_row(result.get("title", TITLES[result["method"]]), result["accuracy"], *more)
    table.add_section()
    for result in results:
        if others := result.get("accuracy_of", {}):
            table.add_row(f"{TITLES[result['method']]}:")
        for name, accuracy in others.items():
            add_row(f"  {name}", accuracy)
    console.print(table)
    for result in results:
        if "slot_usage" in result:
            console.print(constellation_line(result), highlight=False, soft_wrap=True, markup=False)


def constellation_line(result: dict[str, Any]) -> str:
    """Return a sentence on the slot usage, the temperatures and the norms."""
    usage = " / ".join(percent(share) for share in result["slot_usage"])
    norms = ", ".join(f"{norm:.2f}" for norm in result["displacement_norms"]) or "none"
    tau = f"τ {result['tau_balanced']:.2f}"
    if "tau_random" in result:
        tau += f" (random head {result['tau_random']:.2f})"
    return (
        f"{TITLES[result['method']]}: slot usage on the test samples, center first: {usage} %;  {tau};  "
        f"‖δ‖ {norms}, mean ‖w‖ {result['mean_center_norm']:.2f}"
    )
