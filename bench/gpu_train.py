"""Trains CIFAR-100-LT for several seeds and methods side by side, in a limited time, to be gone on with.

    python -m bench.gpu_train --data FILE --folder DIR --seconds 300 --seeds 0 1 2 --methods gist,cos-gist --epochs 200
    python -m bench.gpu_train --data FILE --folder DIR --probe

FILE is what `python -m train --data` takes, long-tailed already (without it the data of train's default recipe), or that packed (.packed), which --unpacker turns into a .npz
in DIR. Each seed of the methods that share a first stage is a process of `python -m train`, with a folder in DIR. Some seconds
before the time is up all are asked to write a checkpoint and to end; the same command goes on. A JSON line is printed for
every model that is finished, also by an earlier call, and at the end one for each process that is not; DIR/results.jsonl
holds the same. --probe takes a few steps in each way that a step can be launched and prints what they cost: see
`bench.gpu_train_probe`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config import DEFAULT_RECIPE
from train.files import write_atomically
from train.methods import FIRST_STAGES, METHODS
from train.training.stopping import CODE as STOPPED

from .gpu_train_env import compiled_env, pack, together_on_gpu, warm

Record = dict[str, Any]
Say = Callable[[Record], None]
REPOSITORY = Path(__file__).resolve().parents[1]
TO_SAVE = 10.0  # seconds, for a checkpoint while others write theirs
POLL = 0.25
#: How a process ends that has not failed: by itself, when asked to, before it listened, or when the time was up.
ENDED = (0, STOPPED, -signal.SIGTERM, -signal.SIGKILL)


@dataclass(frozen=True)
class Job:
    """Methods that share a first stage, trained from one seed: a process and its folder."""

    seed: int
    methods: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{'+'.join(self.methods)}-seed{self.seed}"


def jobs_of(methods: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """In the order of the methods; all seeds of one before the next."""
    families: dict[str, list[str]] = {}
    for method in methods:
        families.setdefault(FIRST_STAGES.get(method, method), []).append(method)
    return [Job(seed, tuple(family)) for family in families.values() for seed in seeds]


def of_data(args: argparse.Namespace, data: Path | None) -> list[str]:
    """Options of train: a long-tailed file, or what the recipe names."""
    recipe = args.recipe or (DEFAULT_RECIPE if data is None else "cifar100-lt")
    return ["--recipe", recipe, *(["--data", str(data), "--imbalance-ratio", "1"] if data else [])]


def command(job: Job, data: Path | None, args: argparse.Namespace) -> list[str]:
    """The training of a job: as far as the time goes, from where an earlier one ended."""
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
    words = [word for option, value in options.items() for word in (f"--{option}", value)]
    words = [
        *of_data(args, data),
        *words,
        "--methods",
        *job.methods,
        "--resume",
        *(["--cuda-graph"] if args.graph else []),
        *(["--compile"] if args.compile else []),
        *args.options,
    ]
    return [sys.executable, "-m", "train", *words]


def unpacked(data: Path | None, folder: Path, unpacker: Path | None) -> Path | None:
    """The file of arrays; of a packed one what the unpacker makes of it, once."""
    if data is None or data.suffix != ".packed":
        return data
    made = folder / f"{data.stem}.npz"
    if not made.exists():
        places = [data.parent / "cifar_packed.py", data.parent.parent / "tools" / "cifar_packed.py"]
        tool = unpacker or next((place for place in places if place.exists()), None)
        if tool is None:
            raise SystemExit(f"--unpacker: expected the script that unpacks {data}, got none")

        def unpack(aside: Path) -> None:
            named = aside.with_name(f"{aside.name}.npz")  # numpy adds the suffix where there is another
            subprocess.run([sys.executable, str(tool), "unpack", str(data), str(named)], check=True)
            named.rename(aside)

        write_atomically(made, unpack)
    return made


def records(folder: Path, job: Job) -> list[Record]:
    """The records that the job's run has written so far; a last line that is not whole yet is left out."""
    file = folder / job.name / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def results(folder: Path, job: Job) -> dict[str, Record]:
    """A line for each of the job's models that is finished, by its method."""
    found = records(folder, job)
    made = {}
    for result in found:
        if result["event"] != "result":
            continue
        epochs = [r for r in found if r["event"] == "epoch" and r["method"] == result["method"]]
        made[result["method"]] = {
            "event": "result",
            "method": result["method"],
            "seed": job.seed,
            "accuracy": result["accuracy"],
            "accuracy_of": {name: a["overall"] for name, a in result.get("accuracy_of", {}).items()},
            "slot_usage": result.get("slot_usage"),
            **progress(epochs),
            "images": result["images"],
        }
    return made


def progress(epochs: list[Record]) -> Record:
    """The progress and the rate: the middle of the epochs' images a second."""
    rates = [epoch["images_per_second"] for epoch in epochs]
    return {
        "epochs": len(epochs),
        "images_per_second": statistics.median(rates) if rates else None,
        "seconds": round(sum(epoch["seconds"] for epoch in epochs), 1),
    }


def unfinished(folder: Path, job: Job, code: int | None) -> Record:
    """The state of a job that has not come to its end, and what its process said last, if that failed."""
    found = records(folder, job)
    finished = [r["method"] for r in found if r["event"] == "result"]
    method = next((m for m in job.methods if m not in finished), None)
    epochs = [r for r in found if r["event"] == "epoch" and r["method"] == method]
    line: Record = {"event": "unfinished", "method": method, "seed": job.seed, **progress(epochs)}
    line |= {key: epochs[-1][key] for key in ("stage", "loss", "lr") if epochs}
    evaluated = [epoch["accuracy"] for epoch in epochs if "accuracy" in epoch]
    line["accuracy_so_far"] = evaluated[-1] if evaluated else None
    if code is not None:
        line["code"] = code
    if code not in (None, *ENDED):
        line |= {"event": "failed", "said": said(folder, job)[-1500:]}
    return line


def said(folder: Path, job: Job) -> str:
    file = folder / f"{job.name}.log"
    return file.read_text(errors="replace") if file.exists() else ""


class Pool:
    """Processes of jobs, so many at once, in their order."""

    def __init__(
        self, jobs: list[Job], data: Path | None, args: argparse.Namespace, env: dict[str, str]
    ) -> None:
        self.args, self.data, self.env = args, data, env
        self.waiting = [job for job in jobs if len(results(args.folder, job)) < len(job.methods)]
        self.running: dict[Job, subprocess.Popen[bytes]] = {}
        self.codes: dict[Job, int] = {}
        #: How many records the first process found, while what it compiles is waited for.
        self.compiling: int | None = len(records(args.folder, self.waiting[0])) if self._cold() else None

    def _cold(self) -> bool:
        return bool(self.args.compile and self.waiting and not warm())

    def _most(self) -> int:
        """Only one process compiles; the others find it done. An epoch's record says that it is."""
        if self.compiling is not None:
            first = next(iter(self.running), None)
            if not self.codes and (first is None or len(records(self.args.folder, first)) == self.compiling):
                return 1
            self.compiling = None
        return self.args.at_once or len(self.running) + len(self.waiting)

    def turn(self) -> None:
        """Take note of what ended, and start what may start."""
        for job, process in list(self.running.items()):
            if (code := process.poll()) is not None:
                self.codes[job] = code
                del self.running[job]
        while self.waiting and len(self.running) < self._most():
            job = self.waiting.pop(0)
            with open(self.args.folder / f"{job.name}.log", "ab") as log:
                self.running[job] = subprocess.Popen(
                    command(job, self.data, self.args),
                    cwd=REPOSITORY,
                    env=self.env,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )

    def stop(self, until: float) -> None:
        """Ask all to save and end; end those that have not by `until`, whose last checkpoint counts."""
        self.waiting = []
        for process in self.running.values():
            process.terminate()
        while self.running and time.monotonic() < until:
            time.sleep(0.05)
            self.turn()
        for process in self.running.values():
            process.kill()
            process.wait()
        self.turn()


def run(args: argparse.Namespace, say: Say) -> int:
    """Train until all is done or the time is up; returns 0, or 1 where a process failed."""
    deadline = time.monotonic() + args.seconds
    jobs = jobs_of(args.methods, args.seeds)
    data = unpacked(args.data, args.folder, args.unpacker)
    shown: set[tuple[Job, str]] = set()

    def show() -> None:
        for job in jobs:
            for method, line in results(args.folder, job).items():
                if (job, method) not in shown:
                    shown.add((job, method))
                    say(line)

    with together_on_gpu(args.mps) as more:
        env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), **more, **compiled_env(args.compile_cache)}
        pool = Pool(jobs, data, args, env)
        try:
            while True:
                pool.turn()
                show()
                if not pool.running or time.monotonic() > deadline - TO_SAVE:
                    break
                time.sleep(POLL)
        finally:
            pool.stop(deadline - 1)
            pack(args.compile_cache)
    show()
    for job in jobs:
        if len(results(args.folder, job)) < len(job.methods):
            say(unfinished(args.folder, job, pool.codes.get(job)))
    return int(any(code not in ENDED for code in pool.codes.values()))


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", type=Path, help="long-tailed: .npz, .packed, …; the recipe's own if not given"
    )
    parser.add_argument("--folder", type=Path, required=True, help="where runs, logs and unpacked data lie")
    parser.add_argument("--seconds", type=float, help="when to be over: 300, or 38 of a probe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", default="gist,cos-gist,cos-balanced-softmax,plain", help="with commas")
    parser.add_argument("--epochs", type=int, default=200, help="of both stages together")
    parser.add_argument("--at-once", type=int, default=3, help="processes; 0: all")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU, for each process")
    parser.add_argument("--recipe", help="cifar100-lt if not given, or without data one that has some")
    parser.add_argument("--precision", default="bf16", choices=("float32", "bf16", "fp16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--graph", action=argparse.BooleanOptionalAction, default=True, help="CUDA graphs of steps"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile of the network")
    parser.add_argument(
        "--compile-cache", type=Path, help=".tgz of what was compiled: read, and written anew"
    )
    parser.add_argument(
        "--mps", action="store_true", help="processes share the GPU by NVIDIA's MPS, where it is there"
    )
    parser.add_argument("--unpacker", type=Path, help="the script that unpacks; beside the data if not given")
    parser.add_argument("--ways", help="of the probe, with commas; all if not given")
    parser.add_argument("--probe", action="store_true", help="only measure steps")
    parser.add_argument("options", nargs="*", help="after --: more options of python -m train")
    args = parser.parse_args(words)
    args.seconds = args.seconds or (38 if args.probe else 300)
    args.methods = args.methods.split(",")
    if unknown := [method for method in args.methods if method not in METHODS]:
        parser.error(f"--methods: expected some of {', '.join(METHODS)}, got {', '.join(unknown)}")
    if args.epochs < 2:
        parser.error(f"--epochs: expected at least 2, one a stage, got {args.epochs}")
    args.folder = args.folder.resolve()
    return args


def main(words: Sequence[str] | None = None) -> int:
    args = parse(words)
    args.folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []

    def say(record: Record) -> None:
        lines.append(json.dumps(record))
        print(lines[-1], flush=True)
        write_atomically(args.folder / "results.jsonl", lambda path: path.write_text("\n".join(lines) + "\n"))

    def ended(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, ended)  # so that the processes are asked to save here too
    if args.probe:
        from .gpu_train_probe import probe

        return probe(args, unpacked(args.data, args.folder, args.unpacker), say)
    return run(args, say)


if __name__ == "__main__":
    sys.exit(main())
