"""The tables of `pytest bench/`, and the rows of the first table of docs/performance.md."""

from __future__ import annotations

from datetime import date

import torch

from ..hardware import processor
from .pairs import Pairs

#: Row -> column -> a measured case, or any other text.
Table = dict[str, dict[str, object]]

#: The table whose rows docs/performance.md shows first.
GLANCE = "Time of gistops, as a multiple of F.linear's (and F.cross_entropy's) in the same precision (ms; n)"


class Tables:
    """The results by title, in the order in which they come."""

    def __init__(self) -> None:
        self.tables: dict[str, Table] = {}

    def add(self, title: str, row: str, column: str, value: object) -> None:
        """Write a cell."""
        self.tables.setdefault(title, {}).setdefault(row, {})[column] = value

    def lines(self) -> list[str]:
        """Return all tables as lines of markdown."""
        lines = []
        for title, table in self.tables.items():
            columns = _columns(table)
            lines += ["", title, "", _row("", *columns), "|---|" + "---|" * len(columns)]
            lines += [
                _row(row, *(cells.get(column, "–") for column in columns)) for row, cells in table.items()
            ]
        if GLANCE in self.tables:
            lines += [
                "",
                "The rows of the first table of docs/performance.md",
                "",
                *glance_rows(self.tables[GLANCE], date.today()),
            ]
        return lines


def glance_rows(table: Table, day: date) -> list[str]:
    """Return the rows of a table with ratios alone, below a row with what is common to all: hardware, version, day and n."""
    columns = _columns(table)
    rounds = [cell.n for cells in table.values() for cell in cells.values() if isinstance(cell, Pairs)]
    common = (
        f"**{processor()}**, {torch.get_num_threads()} threads, torch {torch.__version__}, {day.isoformat()}, "
        f"n = {min(rounds, default=0)} to {max(rounds, default=0)}"
    )
    rows = [_row(common, *[""] * len(columns))]
    for row, cells in table.items():
        found = [cells.get(column) for column in columns]
        rows.append(_row(row, *(f"{x.ratio:.2f}" if isinstance(x, Pairs) else "–" for x in found)))
    return rows


def _columns(table: Table) -> list[str]:
    return list(dict.fromkeys(column for cells in table.values() for column in cells))


def _row(*cells: object) -> str:
    return "|" + "|".join(f" {cell} " if cell != "" else " " for cell in cells) + "|"
