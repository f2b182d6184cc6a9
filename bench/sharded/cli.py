"""Measure a head whose classes are divided between processes, and check the model of its cost: `python -m bench.sharded`.

The command starts the processes itself, on this machine's CPU. Each run is of one size on one number of processes, in new
processes; rounds of runs repeat all of them, so that a busy moment does not fall on one size alone. The files go to --output and are
rewritten after each run. Times are not asserted.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import hardware
from ..gpu.output import save
from ..problem import Size, parse_sizes
from . import report, worker
from .calibration import CALIBRATING
from .model import Case

PROCESSES = (1, 2, 4)
SWEEP = tuple(Size(256, K, 128) for K in (8_142, 65_536, 262_144, 1_000_000, 4_000_000))
SIZES = (*SWEEP, *CALIBRATING, Size(1024, 65_536, 512))
#: Sizes for one process alone, with so many rows that the time per call does not count.
MANY_ROWS = tuple(Size(1024, K, 128) for K in (8_142, 262_144, 1_000_000))
CASES = [
    *(Case(size, ranks) for size in SIZES for ranks in PROCESSES),
    *(Case(size, 1) for size in MANY_ROWS),
]
FIELDS = ("seconds", "work", "optimizer", "waiting", "transfer")
PEAKS = ("sent", "peak of loss", "peak")
ROOT = Path(__file__).resolve().parents[2]


def numbers(text: str) -> tuple[int, ...]:
    """Parse positive integers such as `1,2,4`."""
    parts = text.split(",")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected positive integers such as 1,2,4, got {text!r}")
    return tuple(map(int, parts))


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.sharded",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--sizes",
        type=parse_sizes,
        help="BxKxd, separated by commas, in place of the default sizes; B counts the rows of the joint batch",
    )
    add("--processes", type=numbers, help="numbers of processes, such as 1,2,4, in place of the default ones")
    add("--seconds", type=float, default=3.0, help="time of the steps of a run, at least two; default: 3")
    add("--rounds", type=int, default=2, help="runs of each size and number of processes; default: 2")
    add(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="folder of result.json and table.md; default: print alone",
    )
    options = parser.parse_args(argv)
    options.cases = CASES
    if options.sizes or options.processes:
        chosen = options.sizes or SIZES, options.processes or PROCESSES
        options.cases = [Case(size, ranks) for size, ranks in itertools.product(*chosen)]
    return options


def header(argv: Sequence[str]) -> dict[str, str]:
    """Return the machine, the versions, the commit, the date and the command."""
    return {
        "hardware": hardware.hardware(),
        "cores": str(os.cpu_count()),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "command": shlex.join(["python", "-m", "bench.sharded", *argv]),
    }


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()

    commit = git("rev-parse", "HEAD") or "not known: no git checkout"
    return commit + (" and uncommitted changes" if git("status", "--porcelain") else "")


def busy_seconds() -> float:
    """Return the seconds of CPU time that all programs have taken since the machine started."""
    fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()
    user, nice, system, _, _, irq, softirq, *_ = map(int, fields[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Return the seconds of CPU time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def add_run(results: dict[Case, dict[str, Any]], case: Case, seconds: float) -> None:
    """Make a run and add its values to those of earlier runs of the case."""
    busy, own, begin = busy_seconds(), own_seconds(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bench-sharded-") as folder:
        new = worker.run(case, seconds, Path(folder))
    others = (busy_seconds() - busy - own_seconds() + own) / (time.perf_counter() - begin)
    empty = {"size": asdict(case.size), "ranks": case.ranks, "others": []}
    result = results.setdefault(case, empty | {name: [] for name in FIELDS} | dict.fromkeys(PEAKS, 0))
    for name in FIELDS:
        result[name] += new[name]
    for name in PEAKS:
        result[name] = max(result[name], new[name])
    result["collectives"] = new["collectives"]
    result["others"].append(max(0.0, others))


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = arguments(argv)
    torch.set_num_threads(1)  # as in the processes, for the header
    results: dict[Case, dict[str, Any]] = {}
    document: dict[str, Any] = {"header": header(argv), "cores": os.cpu_count(), "cases": []}
    for number, case in itertools.product(range(options.rounds), options.cases):
        add_run(results, case, options.seconds)
        document["cases"] = list(results.values())
        milliseconds = 1e3 * results[case]["seconds"][-1]
        print(f"round {number + 1}: {case}: {milliseconds:,.1f} ms", file=sys.stderr, flush=True)
        if options.output:
            save(options.output / "result.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
            save(options.output / "table.md", report.render(document))
    print(report.render(document), end="")
    return 0
