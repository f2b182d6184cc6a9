"""Console output."""

from __future__ import annotations

from rich.console import Console


def say(console: Console, line: str) -> None:
    """Print a line without colors or wrapping."""
    console.print(line, highlight=False, soft_wrap=True, markup=False)
