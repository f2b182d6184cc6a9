"""Build, check, measure, profile, test and train gistops on a machine with a GPU: `python -m bench.gpu --day`.

The command runs from the repository. It needs torch, triton, pytest and nvcc (or a library that was built before), no
network and no installed gistops. The files go to $OUT if it is set, otherwise to bench/results/<gpu>-<date>/. They are
rewritten every half minute, so that a killed run leaves its results. bench/README.md describes them. Times are not
asserted. The exit status is 1 if a test failed, a sanitizer reported an error or a variant crashed, and 2 without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import plan, report, selection_rule, targets, variants
from .budget import PARTS, Budget
from .output import Output
from .session import Session, SessionOptions
from .subprocesses import ROOT, kill_all


def parts(text: str) -> list[str]:
    """Parse names of parts such as `build,measure`, and sort them in the order of execution."""
    asked = [part.strip() for part in text.split(",")]
    if wrong := [part for part in asked if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(PARTS)}, got {wrong[0]!r}")
    return [part for part in PARTS if part in asked]


def minutes(text: str) -> float:
    """Parse a positive number of minutes."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected a positive number of minutes, got {text!r}")
    return value


def names(text: str) -> list[str]:
    """Parse patterns of variants such as `triton*,cuda`."""
    try:
        return variants.chosen([pattern.strip() for pattern in text.split(",")])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def cases(text: str) -> plan.Filter:
    """Parse a filter of cases such as `bf16:256x8142x2048,loss`."""
    try:
        return plan.Filter(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--day",
        action="store_true",
        help="all parts at the four sizes; without it: no training, and all sizes of the grid",
    )
    add("--minutes", type=minutes, default=8.0, help="time limit of all parts together; default: 8")
    add("--only", type=parts, metavar="PARTS", help="parts, separated by commas: " + ",".join(PARTS))
    add(
        "--variants",
        type=names,
        metavar="NAMES",
        help="patterns of names such as 'triton*,cuda'; see bench/gpu/variants.py",
    )
    add(
        "--cases",
        type=cases,
        help="cases such as bf16:256x8142x2048,loss: precision, size and kind, joined by colons",
    )
    add("--train", type=Path, metavar="FILE", help=".npz to train on; default: the project's own data")
    add(
        "--train-arguments",
        type=shlex.split,
        default=[],
        help="more options of bench.gpu_train, as one quoted string",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the training runs; default: 0 1 2")
    add(
        "--library",
        type=Path,
        metavar="FOLDER",
        help="GISTOPS_CACHE with compiled ops; nothing is built then",
    )
    add("--output", type=Path, metavar="FOLDER", help="folder of the files")
    # "cpu" tries this command without a GPU. Its figures mean little.
    add("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.only is None:
        options.only = [part for part in PARTS if options.day or part != "train"]
    return options


def no_gpu() -> str | None:
    """Return a sentence that says why there is no GPU to measure, or None."""
    if torch.version.cuda is None:
        return f"bench.gpu needs an NVIDIA GPU, and torch {torch.__version__} is built without CUDA."
    if not torch.cuda.is_available():
        return "bench.gpu needs an NVIDIA GPU, and torch finds none here (`nvidia-smi` says whether the driver does)."
    return None


def _output(*asked: str) -> str | None:
    """Return the output of a command, or None if it is missing or fails."""
    if shutil.which(asked[0]) is None:
        return None
    try:
        done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def header(device: str) -> dict[str, Any]:
    """Return the machine, the versions, the commit and the date of the session."""
    commit = _output("git", "rev-parse", "HEAD")
    if commit and _output("git", "status", "--porcelain"):
        commit += " and uncommitted changes"
    facts: dict[str, Any] = {"gpu": "no GPU (a trial of the bench)"}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts = {
            "gpu": properties.name,
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "multiprocessors": properties.multi_processor_count,
            "L2": f"{properties.L2_cache_size / 2**20:.0f} MiB",
            "compute capability": f"{properties.major}.{properties.minor}",
            "driver": driver.splitlines()[0] if driver else None,
        }
    return facts | {
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "triton": _version("triton"),
        "Python": platform.python_version(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit,
    }


def default_output(gpu: str) -> Path:
    """Return $OUT, or bench/results/<gpu>-<date>/."""
    if out := os.environ.get("OUT"):
        return Path(out)
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return ROOT / "bench" / "results" / f"{name}-{datetime.date.today().isoformat()}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the session and return the exit status."""
    options = arguments(argv)
    if options.device == "cuda" and (why := no_gpu()):
        print(why, file=sys.stderr)
        return 2
    if options.library:
        os.environ["GISTOPS_CACHE"] = str(options.library.resolve())
    budget = Budget(options.minutes, options.only)
    document: dict[str, Any] = {
        "header": header(options.device),
        "options": {"only": options.only, "minutes": options.minutes, "device": options.device},
        "parts": {},
    }
    folder = (options.output or default_output(document["header"]["gpu"])).resolve()
    asked = SessionOptions(
        options.only,
        options.minutes,
        options.device,
        options.variants or variants.chosen(None),
        options.cases,
        not options.day,
        options.train,
        options.seeds,
        options.train_arguments,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the results are still written
    try:
        with Output(folder, document, report.render) as output:
            try:
                Session(asked, budget, output).run()
            finally:
                kill_all()
                document["seconds"] = budget.clock() - budget.begin
                document["rule"] = selection_rule.choose_all(document)
                document["verdicts"] = [verdict._asdict() for verdict in targets.verdicts(document)]
    finally:
        print(f"\n{report.summary(document)}")
        print(f"{budget.clock() - budget.begin:.0f} s; {folder}", flush=True)
    problems = {name: p["problem"] for name, p in document["parts"].items() if "problem" in p}
    for name, problem in problems.items():
        print(f"PROBLEM, {name}: {problem}", file=sys.stderr)
    return 1 if problems else 0
