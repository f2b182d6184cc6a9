"""The parts of `bench.gpu` before the measurements: build, test, sanitize. Each within seconds that it is given."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gistops._toolchain import find_nvcc

from .gpu_run import ROOT

Report = dict[str, Any]
TOOLS = ("memcheck", "racecheck")
SMALL = "130x300x136"
#: What tests/train needs beyond the tests of the operators.
TRAIN_NEEDS = (
    "tyro",
    "typeguard",
    "tomli_w",
    "rich",
    "matplotlib",
    "safetensors",
    "sklearn",
    "PIL",
    "jinja2",
)


@dataclass
class Done:
    """What became of a command."""

    code: int | None  # its exit status; None if its time was up
    output: str  # stdout and stderr
    seconds: float

    def tail(self, lines: int = 25) -> str:
        """The end of what it said."""
        return "\n".join(self.output.splitlines()[-lines:])


def command(arguments: list[str], seconds: float, **environment: str) -> Done:
    """Run a command in the repository, for at most `seconds`; then it is asked to stop, and ten seconds later made to."""
    begin = time.monotonic()
    process = subprocess.Popen(
        arguments,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that what it starts ends with it
    )
    late = False
    try:
        output, _ = process.communicate(timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        late = True
        process.send_signal(signal.SIGINT)  # pytest then still says how many tests have passed
        try:
            output, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
    return Done(None if late else process.returncode, output, time.monotonic() - begin)


def build(seconds: float) -> Report:
    """Compile the operators as the first use does, in a process of its own, and say what is there and why."""
    done = command([sys.executable, "-m", "gistops.info"], seconds)
    rows = re.findall(r"^(cpu|cuda|triton|reference)\s+(yes|no)\s+(.*)$", done.output, re.M)
    report: Report = {
        "seconds": done.seconds,
        "backends": {name: {"available": there == "yes", "reason": why} for name, there, why in rows},
        "output": done.output,
    }
    if done.code != 0:
        how = f"did not end within {seconds:.0f} s" if done.code is None else f"ended with {done.code}"
        report["problem"] = f"`python -m gistops.info` {how}"
    elif missing := [name for name in ("cuda", "triton") if not report["backends"][name]["available"]]:
        report["problem"] = f"not available: {', '.join(missing)}"
    return report


def _counts(output: str) -> dict[str, int]:
    """What pytest's last line counts: `3 failed, 10 passed in 2.1s`."""
    for line in reversed(output.splitlines()):
        found = re.findall(r"(\d+) (passed|failed|errors?|skipped|xfailed|xpassed|deselected)", line)
        if found and " in " in line:
            return {word.rstrip("s") if word.startswith("error") else word: int(n) for n, word in found}
    return {}


def _pytest(arguments: list[str], seconds: float) -> Report:
    parallel = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    options = [
        "-q",
        "--maxfail=30",
        "--continue-on-collection-errors",
        "-p",
        "no:cacheprovider",
        "--tb=short",
    ]
    asked = [sys.executable, "-m", "pytest", *options, *parallel, *arguments]
    done = command(asked, seconds)
    report: Report = {
        "command": " ".join(["python", *asked[1:]]),
        "seconds": done.seconds,
        "counts": _counts(done.output),
        "failures": re.findall(r"^(?:FAILED|ERROR) .*$", done.output, re.M)[:30],
        "tail": done.tail(),
    }
    if done.code is None:
        report["problem"] = f"stopped after {seconds:.0f} s"
    elif done.code != 0:
        bad = {word: n for word, n in report["counts"].items() if word in ("failed", "error")}
        said = ", ".join(f"{n} {word}" for word, n in bad.items())
        report["problem"] = said or f"pytest ended with {done.code}"
    return report


def run_tests(seconds: float, clock: Callable[[], float] = time.monotonic) -> Report:
    """The operators' tests on the GPU first, then the others, so that a short time still shows what matters most."""
    begin = clock()
    report: Report = {"runs": {}}
    missing = [module for module in TRAIN_NEEDS if importlib.util.find_spec(module) is None]
    rest = ["tests", "--ignore=tests/ops"]
    if missing:
        rest.append("--ignore=tests/train")
        report["not run"] = f"tests/train, which need {', '.join(missing)}"
    for name, arguments in (("operators on the GPU", ["tests/ops", "--device", "cuda"]), ("others", rest)):
        left = seconds - (clock() - begin)
        if left < 5:
            report["runs"][name] = {"problem": "no time was left for them"}
        else:
            report["runs"][name] = _pytest(arguments, left)
    problems = [f"{name}: {run['problem']}" for name, run in report["runs"].items() if "problem" in run]
    if problems:
        report["problem"] = "; ".join(problems)
    return report


def find_sanitizer() -> Path | None:
    """compute-sanitizer: on PATH, or in CUDA's folder."""
    if path := shutil.which("compute-sanitizer"):
        return Path(path)
    nvcc = find_nvcc()
    homes = [nvcc.resolve().parent.parent] if nvcc else []
    for home in (*homes, Path("/usr/local/cuda")):
        for path_ in (home / "bin" / "compute-sanitizer", home / "compute-sanitizer" / "compute-sanitizer"):
            if path_.is_file():
                return path_
    return None


def sanitize(seconds: float, backends: list[str]) -> Report:
    """compute-sanitizer's memcheck and racecheck over one small forward and backward of each backend, all at once."""
    program = find_sanitizer()
    if program is None:
        return {"not run": "compute-sanitizer was found neither on PATH nor beside nvcc"}

    def watch(pair: tuple[str, str]) -> Report:
        backend, tool = pair
        asked = [str(program), "--tool", tool, "--target-processes", "application-only"]
        asked += ["--error-exitcode", "9", sys.executable, "-m", "bench.gpu_case", backend, SMALL]
        # Without torch's cache of memory each tensor is an allocation of its own, whose bounds are watched.
        return _sanitized(command(asked, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1"), seconds)

    pairs = [(backend, tool) for backend in backends for tool in TOOLS]
    with ThreadPoolExecutor(max(1, len(pairs))) as pool:
        runs = pool.map(watch, pairs)
        report: Report = {"runs": {" ".join(pair): run for pair, run in zip(pairs, runs, strict=True)}}
    problems = [f"{name}: {run['problem']}" for name, run in report["runs"].items() if "problem" in run]
    if problems:
        report["problem"] = "; ".join(problems)
    return report


def _sanitized(done: Done, seconds: float) -> Report:
    said = [line.strip("= ") for line in done.output.splitlines() if line.startswith("=========")]
    summary = [line for line in said if "SUMMARY" in line]
    run: Report = {"seconds": done.seconds, "summary": summary[-1] if summary else None}
    if done.code == 0 and summary:
        return run
    run["tail"] = "\n".join(said[:40]) or done.tail()
    if done.code is None:
        run["problem"] = f"stopped after {seconds:.0f} s"
    else:
        run["problem"] = run["summary"] or f"ended with {done.code} and no summary"
    return run
