"""One command for a machine with a GPU: `python -m bench.gpu` builds, tests, sanitizes, measures, and writes it down.

It needs torch, triton, pytest and nvcc there, no network, and no installed gistops: it runs from the repository. The
results are bench/results/<gpu>-<date>.json, and the same as a page beside it, written anew after each case: a run that
is killed leaves what it had. Nothing is asserted of the times. The exit status is 1 where a test failed, the sanitizer
complained or a form crashed, and 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import gpu_parts, gpu_report
from .forms import Size
from .gpu_plan import Case, plan
from .gpu_run import GRACE, ROOT, Bench

#: Part -> its weight in the time. What a part does not use is there for the later ones.
PARTS = {"build": 4.0, "test": 3.0, "sanitize": 2.0, "bench": 5.5}


class Budget:
    """How long each part may take, so that all end in time."""

    def __init__(self, minutes: float, parts: Sequence[str], clock: Callable[[], float] = time.time) -> None:
        """Start the time.

        Args:
            minutes: for all parts.
            parts: those that will run.
            clock: seconds.
        """
        self.clock = clock
        self.begin = clock()
        self.end = self.begin + 60 * minutes
        self.parts = [part for part in PARTS if part in parts]

    def seconds(self, part: str) -> float:
        """What `part` may take, if it begins now and the parts before it have ended."""
        later = self.parts[self.parts.index(part) :]
        return max(0.0, self.end - self.clock()) * PARTS[part] / sum(PARTS[p] for p in later)


def parts(text: str) -> list[str]:
    """`build,bench` as the parts in their order."""
    asked = [part.strip() for part in text.split(",")]
    if wrong := [part for part in asked if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(PARTS)}, got {wrong[0]!r}")
    return [part for part in PARTS if part in asked]


def minutes(text: str) -> float:
    """A positive number of minutes."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected a positive number of minutes, got {text!r}")
    return value


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", type=parts, default=list(PARTS), metavar="PARTS", help="some of " + ",".join(PARTS)
    )
    parser.add_argument("--minutes", type=minutes, default=8.0, help="at most, for all parts (8)")
    parser.add_argument("--output", type=Path, help="the JSON file; the page is written beside it, as .md")
    # To try this command without a GPU: little of what it measures there means anything.
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def no_gpu() -> str | None:
    """Why there is nothing to measure on, in a sentence, or None."""
    if torch.version.cuda is None:
        return f"bench.gpu needs an NVIDIA GPU, and torch {torch.__version__} is built without CUDA."
    if not torch.cuda.is_available():
        return "bench.gpu needs an NVIDIA GPU, and torch finds none here (`nvidia-smi` says whether the driver does)."
    return None


def _said(*asked: str) -> str | None:
    """What a command says, where it is there and succeeds."""
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
    """What the numbers belong to: machine, versions, commit, date."""
    commit = _said("git", "rev-parse", "HEAD")
    if commit and _said("git", "status", "--porcelain"):
        commit += " and changes that are not committed"
    facts: dict[str, Any] = {"gpu": "no GPU (a trial of the bench itself)"}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
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
    """bench/results/<gpu>-<date>.json."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return ROOT / "bench" / "results" / f"{name}-{datetime.date.today().isoformat()}.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for; the exit status."""
    options = arguments(argv)
    if options.device == "cuda" and (why := no_gpu()):
        print(why, file=sys.stderr)
        return 2
    budget = Budget(options.minutes, options.only)
    document: gpu_report.Document = {
        "header": header(options.device),
        "options": {"only": options.only, "minutes": options.minutes},
        "parts": {},
    }
    output = (options.output or default_output(document["header"]["gpu"])).resolve()

    def changed() -> None:
        gpu_report.write(output, document)

    def part(name: str, run: Callable[[float], gpu_parts.Report]) -> None:
        if name not in options.only:
            return
        seconds = budget.seconds(name)
        print(f"=== {name} (at most {seconds:.0f} s)", flush=True)
        try:
            report = run(seconds)
        except Exception as error:  # the other parts still tell something
            report = {"problem": f"{type(error).__name__}: {error}"}
        document["parts"][name] = report
        if "output" in report:
            print(report["output"].strip())
        for found in report.get("runs", {}).values():
            print(found.get("tail", found.get("summary", "")))
        changed()

    def measure(seconds: float) -> gpu_parts.Report:
        cases = plan() if options.device == "cuda" else [tiny(case) for case in plan()]
        bench = Bench(cases, budget.clock() + seconds - GRACE - 2, lambda: None, options.device)
        said = 0

        def keep() -> None:
            nonlocal said
            for result in bench.results[said:]:
                print(gpu_report.line(result), flush=True)
            said = len(bench.results)
            document.update(
                ceilings=bench.ceilings, cases=bench.results, skipped=bench.skipped, problems=bench.problems
            )
            changed()

        bench.changed = keep
        bench.run()
        report: gpu_parts.Report = {"measured": len(bench.results), "skipped": len(bench.skipped)}
        if bad := wrong(document):
            report["problem"] = bad
        return report

    part("build", gpu_parts.build)
    part("test", gpu_parts.run_tests)
    part("sanitize", lambda seconds: gpu_parts.sanitize(seconds, available(document)))
    part("bench", measure)
    document["seconds"] = budget.clock() - budget.begin
    changed()
    print(f"\n{gpu_report.summary(document)}")
    print(f"{document['seconds']:.0f} s; {output} and {output.with_suffix('.md').name}")
    problems = {name: p["problem"] for name, p in document["parts"].items() if "problem" in p}
    for name, problem in problems.items():
        print(f"PROBLEM, {name}: {problem}", file=sys.stderr)
    return 1 if problems else 0


def tiny(case: Case) -> Case:
    """A case that a CPU can try."""
    size = case.size
    return replace(case, size=Size(size.B // 16, size.K // 100, size.d // 16), seconds=case.seconds / 10)


def available(document: gpu_report.Document) -> list[str]:
    """The backends worth to watch: those that the build has found, or both where it was not run."""
    built = document["parts"].get("build", {}).get("backends", {})
    return [name for name in ("cuda", "triton") if built.get(name, {"available": True})["available"]]


def wrong(document: gpu_report.Document) -> str:
    """What the measurements say against ours: crashes, failures, results that are not exact."""
    said = list(document.get("problems", []))
    for result in document.get("cases", []):
        for form in ("cuda", "triton"):
            found = result["forms"].get(form, {})
            if why := found.get("failed") or found.get("inexact"):
                said.append(f"{result['case']['precision']} {result['case']['kind']}, {form}: {why}")
    unique = list(dict.fromkeys(said))
    return "; ".join(unique[:5]) + (f"; and {len(unique) - 5} more" if len(unique) > 5 else "")


if __name__ == "__main__":
    sys.exit(main())
