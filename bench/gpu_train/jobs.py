"""The training processes of `bench.gpu_train`: their commands, and the records that they have written so far."""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config import DEFAULT_RECIPE
from train.files import write_atomically
from train.methods import FIRST_STAGES
from train.training.stopping import EXIT_CODE as STOPPED

Record = dict[str, Any]
#: Exit codes of a process that has not failed: it finished, it stopped on request, or a signal ended it.
EXPECTED_CODES = (0, STOPPED, -signal.SIGTERM, -signal.SIGKILL)


@dataclass(frozen=True)
class Job:
    """One training process: the methods that share a first stage, with one seed."""

    seed: int
    methods: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of the job's run folder."""
        return f"{'+'.join(self.methods)}-seed{self.seed}"


def make_jobs(methods: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Group the methods by first stage. Jobs keep the order of the methods, with all seeds of a group together."""
    groups: dict[str, list[str]] = {}
    for method in methods:
        groups.setdefault(FIRST_STAGES.get(method, method), []).append(method)
    return [Job(seed, tuple(group)) for group in groups.values() for seed in seeds]


def data_options(args: argparse.Namespace, data: Path | None) -> list[str]:
    """Return the options of `python -m train` that select the data: a long-tailed file, or the recipe's own data."""
    recipe = args.recipe or (DEFAULT_RECIPE if data is None else "cifar100-lt")
    return ["--recipe", recipe, *(["--data", str(data), "--imbalance-ratio", "1"] if data else [])]


def train_command(job: Job, data: Path | None, args: argparse.Namespace) -> list[str]:
    """Return the command that trains a job and resumes its run folder."""
    options = {
        "runs": str(args.folder),
        "name": job.name,
        "seed": str(job.seed),
        "stage1-epochs": str(args.epochs // 2),
        "stage2-epochs": str(args.epochs - args.epochs // 2),
        "precision": args.precision,
        "device": args.device,
        "threads": str(args.threads),
        "checkpoint-seconds": "20",
    }
    return [
        *(sys.executable, "-m", "train"),
        *data_options(args, data),
        *(word for option, value in options.items() for word in (f"--{option}", value)),
        "--methods",
        *job.methods,
        "--resume",
        *(["--cuda-graph"] if args.graph else []),
        *(["--compile"] if args.compile else []),
        *args.options,
    ]


def unpack(data: Path | None, folder: Path, unpacker: Path | None) -> Path | None:
    """Return the file of arrays. A .packed file is unpacked into `folder` once."""
    if data is None or data.suffix != ".packed":
        return data
    arrays = folder / f"{data.stem}.npz"
    if not arrays.exists():
        places = [data.parent / "cifar_packed.py", data.parent.parent / "tools" / "cifar_packed.py"]
        tool = unpacker or next((place for place in places if place.exists()), None)
        if tool is None:
            raise SystemExit(f"--unpacker: expected the script that unpacks {data}, got none")

        def write(path: Path) -> None:
            npz = path.with_name(f"{path.name}.npz")  # numpy appends this suffix to any other
            subprocess.run([sys.executable, str(tool), "unpack", str(data), str(npz)], check=True)
            npz.rename(path)

        write_atomically(arrays, write)
    return arrays


def read_records(folder: Path, job: Job) -> list[Record]:
    """Return the records that the job's run has written so far, without an incomplete last line."""
    file = folder / job.name / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_log(folder: Path, job: Job) -> str:
    """Return the output of the job's processes."""
    file = folder / f"{job.name}.log"
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def finished_models(folder: Path, job: Job) -> dict[str, Record]:
    """Return a result record per finished model of the job, by method."""
    records = read_records(folder, job)
    finished = {}
    for result in records:
        if result["event"] != "result":
            continue
        epochs = [r for r in records if r["event"] == "epoch" and r["method"] == result["method"]]
        finished[result["method"]] = {
            "event": "result",
            "method": result["method"],
            "seed": job.seed,
            "accuracy": result["accuracy"],
            "accuracy_of": {name: a["overall"] for name, a in result.get("accuracy_of", {}).items()},
            "slot_usage": result.get("slot_usage"),
            **_progress(epochs),
            "images": result["images"],
        }
    return finished


def unfinished(folder: Path, job: Job, code: int | None) -> Record:
    """Return a record of a job that is not finished. If its process failed, the record holds the end of its log.

    Args:
        folder: folder of the runs.
        job: the job.
        code: exit code of the job's process, or None if it was not started.
    """
    records = read_records(folder, job)
    finished = [r["method"] for r in records if r["event"] == "result"]
    method = next((m for m in job.methods if m not in finished), None)
    epochs = [r for r in records if r["event"] == "epoch" and r["method"] == method]
    record: Record = {"event": "unfinished", "method": method, "seed": job.seed, **_progress(epochs)}
    record |= {key: epochs[-1][key] for key in ("stage", "loss", "lr") if epochs}
    accuracies = [epoch["accuracy"] for epoch in epochs if "accuracy" in epoch]
    record["accuracy_so_far"] = accuracies[-1] if accuracies else None
    if code is not None:
        record["code"] = code
    if code not in (None, *EXPECTED_CODES):
        record |= {"event": "failed", "said": read_log(folder, job)[-1500:]}
    return record


def _progress(epochs: list[Record]) -> Record:
    """Return the number of epochs, the median of their images per second, and their seconds."""
    rates = [epoch["images_per_second"] for epoch in epochs]
    return {
        "epochs": len(epochs),
        "images_per_second": statistics.median(rates) if rates else None,
        "seconds": round(sum(epoch["seconds"] for epoch in epochs), 1),
    }
