"""The parts of a session that may share the GPU: tests per backend, sanitizers, training. They run concurrently, last."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gistops._toolchain import find_nvcc
from train.data.processes import num_cores

from .output import Logs
from .subprocesses import ROOT, CommandResult, kill_all, python_command, run_command

Report = dict[str, Any]
Job = tuple[str, str, Callable[[], Report]]  # part, name, function
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
#: They reach every tile shape, a d that is not a multiple of the vector width, and more displacements than the fused
#: kernels hold.
SANITIZED_SIZES = ("300x200x136", "100x200x33", "130x200x136x12")
PYTEST = ("-q", "--maxfail=30", "--continue-on-collection-errors", "-p", "no:cacheprovider", "--tb=short")
#: Tests of the training driver on a GPU. They skip where there is none.
TRAINING_TESTS = "tests/train/training/test_gpu.py"
#: The folder of the training runs, which a second call resumes. git ignores it.
RUNS = ROOT / "runs" / "gpu-day"


def parse_pytest_counts(output: str) -> dict[str, int]:
    """Parse the counts in pytest's last line, such as `3 failed, 10 passed in 2.1s`."""
    for line in reversed(output.splitlines()):
        found = re.findall(r"(\d+) (passed|failed|errors?|skipped|xfailed|xpassed|deselected)", line)
        if found and " in " in line:
            return {word.rstrip("s") if word.startswith("error") else word: int(n) for n, word in found}
    return {}


def pytest_arguments(device: str, backends: Sequence[str]) -> dict[str, list[str]]:
    """Return pytest's arguments by name. Each backend has a process, so that a crash does not hide the others."""
    device_options = ["--device", device]
    # Tests that belong to no backend run with the first backend.
    others = [["-k", f"not {' and not '.join(backends[1:])}"], *(["-k", b] for b in backends[1:])]
    selected = dict(zip(backends, others if backends[1:] else [[]], strict=False))
    return {
        **{f"operators, {b}": ["tests/ops", *device_options, *only] for b, only in selected.items()},
        "heads": ["tests/nn", *device_options],
        "large": ["tests/ops", *device_options, "-m", "large"],
        # Its tests choose the GPU themselves: with --device, the driver's tensors on the CPU would be on the GPU too.
        "training": [TRAINING_TESTS],
    }


def pytest_jobs(
    device: str, backends: Sequence[str], seconds_left: Callable[[], float], logs: Logs
) -> list[Job]:
    """Return the jobs of the part "test"."""
    workers = max(1, num_cores() // 3)

    def job(name: str, arguments: list[str]) -> Job:
        share = workers if name.startswith("operators") else max(1, workers // 2)
        return "test", name, lambda: run_pytest(name, arguments, share, seconds_left() - 3, logs)

    return [job(name, arguments) for name, arguments in pytest_arguments(device, backends).items()]


def run_pytest(name: str, arguments: Sequence[str], workers: int, seconds: float, logs: Logs) -> Report:
    """Run pytest once."""
    parallel = ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") else []
    asked = python_command("-m", "pytest", *PYTEST, *parallel, *arguments)
    done = run_command(asked, seconds, logs.part(f"{name}: {' '.join(asked[1:])}"))
    report: Report = {
        "command": " ".join(["python", *asked[1:]]),
        "seconds": done.seconds,
        "counts": parse_pytest_counts(done.output),
        "failures": re.findall(r"^(?:FAILED|ERROR) .*$", done.output, re.M)[:30],
        "tail": done.tail(15),
    }
    if done.code is None:
        report["problem"] = f"stopped after {seconds:.0f} s"
    elif done.code == 5:  # pytest's code for an empty selection
        report["not run"] = "no test was selected"
    elif done.code != 0:
        bad = {word: n for word, n in report["counts"].items() if word in ("failed", "error")}
        report["problem"] = (
            ", ".join(f"{n} {word}" for word, n in bad.items()) or f"pytest ended with {done.code}"
        )
    return report


def find_sanitizer() -> Path | None:
    """Find compute-sanitizer on PATH or in CUDA's folder."""
    if path := shutil.which("compute-sanitizer"):
        return Path(path)
    nvcc = find_nvcc()
    homes = [nvcc.resolve().parent.parent] if nvcc else []
    for home in (*homes, Path("/usr/local/cuda")):
        for candidate in (
            home / "bin" / "compute-sanitizer",
            home / "compute-sanitizer" / "compute-sanitizer",
        ):
            if candidate.is_file():
                return candidate
    return None


def sanitizer_jobs(
    program: Path, backends: Sequence[str], seconds_left: Callable[[], float], logs: Logs
) -> list[Job]:
    """Return the jobs of the part "sanitize"."""

    def job(backend: str, tool: str) -> Job:
        name = f"{backend} {tool}"
        return "sanitize", name, lambda: run_sanitizer(program, backend, tool, seconds_left() - 3, logs)

    return [job(backend, tool) for backend in backends for tool in SANITIZERS]


def run_sanitizer(program: Path, backend: str, tool: str, seconds: float, logs: Logs) -> Report:
    """Run one sanitizer over small forwards and backwards of one backend."""
    asked = [str(program), "--tool", tool, "--target-processes", "application-only", "--error-exitcode", "9"]
    asked += python_command("-m", "bench.gpu.sanitizer_case", backend, *SANITIZED_SIZES)
    # Without torch's caching allocator each tensor is a separate allocation, whose bounds the sanitizer checks.
    done = run_command(
        asked, seconds, logs.part(f"{backend} {tool}"), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    )
    return parse_sanitizer(done, seconds)


def parse_sanitizer(done: CommandResult, seconds: float) -> Report:
    """Parse the output of a sanitizer."""
    lines = [line.strip("= ") for line in done.output.splitlines() if line.startswith("=========")]
    summary = [line for line in lines if "SUMMARY" in line]
    run: Report = {"seconds": done.seconds, "summary": summary[-1] if summary else None}
    run["reached"] = re.findall(r"^.*: done$", done.output, re.M)[-1:]
    if done.code == 0 and summary:
        return run
    run["tail"] = "\n".join(lines[:40]) or done.tail()
    if done.code is None:
        run["problem"] = f"stopped after {seconds:.0f} s"
    else:
        run["problem"] = run["summary"] or f"ended with {done.code} and no summary"
    return run


def run_training(
    data: Path | None, seeds: Sequence[int], device: str, more: Sequence[str], seconds: float, log: Path
) -> Report:
    """Run `bench.gpu_train` in a folder that a second call resumes."""
    if importlib.util.find_spec("bench.gpu_train") is None:
        return {"not run": "bench/gpu_train is missing"}
    asked = python_command(
        "-m", "bench.gpu_train", "--folder", str(RUNS), "--seconds", f"{max(seconds - 5, 1):.0f}"
    )
    asked += ["--data", str(data)] if data else []
    asked += ["--device", device] if device != "cuda" else []
    asked += ["--seeds", *map(str, seeds), *more]
    done = run_command(asked, seconds, log)
    report: Report = {"seconds": done.seconds, "models": parse_models(done.output), "tail": done.tail(15)}
    if done.code != 0:
        report["problem"] = (
            f"stopped after {seconds:.0f} s"
            if done.code is None
            else f"ended with {done.code}: {done.tail(1)}"
        )
    return report


def parse_models(output: str) -> list[Any]:
    """Parse the lines that are JSON: one per finished model."""
    found = []
    for line in output.splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def run_concurrently(jobs: Sequence[Job], document: dict[str, Any], changed: Callable[[], None]) -> None:
    """Run jobs concurrently. Each result goes to document["parts"][part]["runs"][name] when its job ends."""

    def run(job: Job) -> None:
        part, name, do = job
        try:
            found = do()
        except Exception as error:  # the other jobs continue
            found = {"problem": f"{type(error).__name__}: {error}"}
        runs = document["parts"].setdefault(part, {}).setdefault("runs", {})
        runs[name] = found
        problems = [f"{n}: {r['problem']}" for n, r in runs.items() if "problem" in r]
        if problems:
            document["parts"][part]["problem"] = "; ".join(problems)
        print(
            f"{part}, {name}: {found.get('problem') or found.get('counts') or found.get('summary') or 'done'}",
            flush=True,
        )
        changed()

    pool = ThreadPoolExecutor(max(1, len(jobs)))
    try:
        list(pool.map(run, jobs))
    except BaseException:  # SIGTERM or an interrupt: jobs that run would otherwise be waited for
        kill_all(exiting=True)
        raise
    finally:
        pool.shutdown(cancel_futures=True)
