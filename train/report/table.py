"""What a run ends with on the terminal: a table of accuracies, a few lines about the constellation."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..methods import TITLES
from ..shot_groups import GROUPS, split_classes


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def num_classes(count: int) -> str:
    return f"{count} class" if count == 1 else f"{count} classes"


def print_results(console: Console, results: list[dict[str, Any]], train_counts: Tensor, rule: str) -> None:
    """Print the table and, for GistNet, slot usage, temperatures and the size of the displacements."""
    sizes = {group: num_classes(int(mask.sum())) for group, mask in split_classes(train_counts, rule).items()}
    table = Table(title=f"Test accuracy in %, split rule {rule}")
    table.add_column("", no_wrap=True)
    table.add_column(f"overall\n{num_classes(len(train_counts))}", justify="right")
    for group in GROUPS:
        table.add_column(f"{group}\n{sizes[group]}", justify="right")
    table.add_column("image\npasses", justify="right")
    for result in results:
        rows = {TITLES[result["method"]]: result["accuracy"]}
        rows |= {f"  {name}": accuracy for name, accuracy in result.get("accuracy_of", {}).items()}
        for name, accuracy in rows.items():
            shown = (percent(accuracy[column]) for column in ("overall", *GROUPS))
            table.add_row(name, *shown, "" if name.startswith(" ") else f"{result['images']:,}")
    console.print(table)
    for result in results:
        if "slot_usage" in result:
            console.print(constellation_line(result), highlight=False, soft_wrap=True, markup=False)


def constellation_line(result: dict[str, Any]) -> str:
    """Slot usage, τ's and ‖δ‖ in words."""
    usage = " / ".join(percent(share) for share in result["slot_usage"])
    norms = ", ".join(f"{norm:.2f}" for norm in result["displacement_norms"]) or "none"
    tau = f"τ {result['tau_balanced']:.2f}"
    if "tau_random" in result:
        tau += f", of the random head {result['tau_random']:.2f}"
    return (
        f"{TITLES[result['method']]}: slot usage on test images, centre first: {usage} %;  {tau};  "
        f"‖δ‖ {norms} beside a mean ‖w‖ of {result['mean_center_norm']:.2f}"
    )
