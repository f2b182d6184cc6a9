"""The command `report`: an HTML page that compares several runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from ..cli import parse_command
from ..config import ConfigError
from ..console import messages_of, print_json, say
from ..files import write_atomically
from ..report.figures import Record
from ..report.html import read_records, write_page
from .model_file import check_out


@dataclass(frozen=True, kw_only=True)
class Report:
    """Writes an HTML page that compares several runs."""

    #: Folders of finished runs or ablations, such as runs/smoke.
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDERS...")]
    #: The page to write.
    out: Path = Path("report.html")
    #: Write one JSON object to standard output: the page, and the results of each run.
    json: bool = False


def runs_in(folder: Path) -> list[Path]:
    """Return the folder of a run, or the folders of all runs in the folder of an ablation."""
    if (folder / "metrics.jsonl").is_file():
        return [folder]
    return [file.parent for file in sorted(folder.rglob("metrics.jsonl"))] or [folder]


def _records_of(run: Path) -> list[Record]:
    try:
        return read_records(run)
    except (OSError, ValueError) as error:
        raise ConfigError("folders", "folders of finished runs", f"{run} ({error})") from None


def compare(args: list[str], console: Console) -> int:
    """Write an HTML page that compares several runs.

    Raises:
        ConfigError: a folder does not hold a finished run, or the page cannot be written.
    """
    options = parse_command(args, Report, "report")
    messages = messages_of(console, as_json=options.json)
    if not options.folders:
        raise ConfigError("folders", "folders of finished runs", "none")
    runs: dict[str, list[Record]] = {}
    for folder in options.folders:
        for run in runs_in(folder):
            records = _records_of(run)
            if any(record["event"] == "result" for record in records):
                runs[str(run)] = records
            elif run == folder:
                raise ConfigError("folders", "folders of finished runs", f"{folder}, which has no result yet")
            else:
                say(messages, f"left out {run}, which has no result yet")
        if not any(Path(run).is_relative_to(folder) for run in runs):
            raise ConfigError(
                "folders", "folders of finished runs", f"{folder}, whose runs have no result yet"
            )
    about = "Runs: " + ", ".join(runs) + "."
    check_out(options.out)
    write_atomically(options.out, lambda path: write_page(path, runs, "Comparison", about))
    if options.json:
        results = {run: [x for x in records if x["event"] == "result"] for run, records in runs.items()}
        print_json({"file": str(options.out), "runs": results})
    say(messages, f"written to {options.out}")
    return 0
