"""The command `report`: an HTML page that compares several runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from ..cli import program
from ..config import ConfigError
from ..console import say
from ..files import write_atomically
from ..report.figures import Record
from ..report.html import read_records, write_page


def compare(args: list[str], console: Console) -> int:
    """Write an HTML page that compares several runs.

    Raises:
        ConfigError: a folder does not hold a finished run, or the page cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog=program("report"), description="Writes an HTML page that compares several runs."
    )
    parser.add_argument("folders", nargs="+", type=Path, help="folders of finished runs, such as runs/smoke")
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), help="the page (default: report.html)"
    )
    options = parser.parse_args(args)
    runs: dict[str, list[Record]] = {}
    for folder in options.folders:
        try:
            runs[str(folder)] = read_records(folder)
        except (OSError, ValueError) as error:
            raise ConfigError("folders", "folders of finished runs", f"{folder} ({error})") from None
        if not any(record["event"] == "result" for record in runs[str(folder)]):
            raise ConfigError("folders", "folders of finished runs", f"{folder}, which has no result yet")
    about = "Runs: " + ", ".join(runs) + "."
    if not options.out.absolute().parent.is_dir():
        raise ConfigError("out", "a file in an existing folder", str(options.out))
    write_atomically(options.out, lambda path: write_page(path, runs, "Comparison", about))
    say(console, f"written to {options.out}")
    return 0
