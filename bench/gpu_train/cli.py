"""Train several seeds and methods concurrently on one GPU, within a time limit. The same command resumes.

    python -m bench.gpu_train --data FILE --folder DIR --seconds 300 --seeds 0 1 2 --methods gist,cos-gist --epochs 200
    python -m bench.gpu_train --data FILE --folder DIR --probe

FILE is a long-tailed dataset, as `python -m train --data` takes it. A .packed file is unpacked by --unpacker into a .npz
file in DIR. Without --data the recipe's own data is used. Methods that share a first stage are trained in one process
per seed, with a run folder in DIR. Shortly before the time limit all processes are asked to write a checkpoint and exit.
The command prints a JSON line per finished model, including models that an earlier call has finished, and at the end a
JSON line per unfinished process. DIR/results.jsonl holds the same lines. With --probe it measures a few training steps
in each launch mode instead: see `bench/gpu_train/probe.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from train.files import write_atomically
from train.methods import METHODS

from .environment import compile_cache_env, multi_process_service, save_compile_cache
from .jobs import EXPECTED_CODES, Job, Record, finished_models, make_jobs, unfinished, unpack
from .pool import Pool

Emit = Callable[[Record], None]
CHECKPOINT_SECONDS = 10.0  # reserved before the time limit: all processes write their checkpoints at once
POLL_SECONDS = 0.25


def run(args: argparse.Namespace, emit: Emit) -> int:
    """Train until all jobs are done or the time is up. Return 1 if a process failed, otherwise 0."""
    deadline = time.monotonic() + args.seconds
    jobs = make_jobs(args.methods, args.seeds)
    data = unpack(args.data, args.folder, args.unpacker)
    emitted: set[tuple[Job, str]] = set()

    def emit_finished() -> None:
        for job in jobs:
            for method, record in finished_models(args.folder, job).items():
                if (job, method) not in emitted:
                    emitted.add((job, method))
                    emit(record)

    with multi_process_service(args.mps) as mps_env:
        threads = {"OMP_NUM_THREADS": str(args.threads)}
        env = {**os.environ, **threads, **mps_env, **compile_cache_env(args.compile_cache)}
        pool = Pool(jobs, data, args, env)
        try:
            while True:
                pool.poll()
                emit_finished()
                if not pool.running or time.monotonic() > deadline - CHECKPOINT_SECONDS:
                    break
                time.sleep(POLL_SECONDS)
        finally:
            pool.stop(deadline - 1)
            save_compile_cache(args.compile_cache)
    emit_finished()
    for job in jobs:
        if len(finished_models(args.folder, job)) < len(job.methods):
            emit(unfinished(args.folder, job, pool.codes.get(job)))
    return int(any(code not in EXPECTED_CODES for code in pool.codes.values()))


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, help="long-tailed dataset (.npz, .packed, ...); default: the recipe's own data")
    add("--folder", type=Path, required=True, help="folder of the runs, the logs and the unpacked data")
    add("--seconds", type=float, help="time limit; default: 300, with --probe 38")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--methods", default="gist,cos-gist,cos-balanced-softmax,plain", help="separated by commas")
    add("--epochs", type=int, default=200, help="epochs of both stages together")
    add("--at-once", type=int, default=3, help="number of concurrent processes; 0: all")
    add("--threads", type=int, default=2, help="CPU threads per process")
    add("--recipe", help="default: cifar100-lt with --data, otherwise a recipe that brings its own data")
    add("--precision", default="bf16", choices=("float32", "bf16", "fp16"))
    add("--device", default="auto")
    add("--graph", action=argparse.BooleanOptionalAction, default=True, help="capture steps in CUDA graphs")
    add("--compile", action="store_true", help="compile the network with torch.compile")
    add("--compile-cache", type=Path, help=".tgz of compiled code: loaded at the start, saved at the end")
    add("--mps", action="store_true", help="share the GPU through NVIDIA's MPS, if it is available")
    add("--unpacker", type=Path, help="script that unpacks .packed files; default: searched near the data")
    add("--ways", help="with --probe: launch modes, separated by commas; default: all")
    add("--probe", action="store_true", help="only measure training steps")
    add("options", nargs="*", help="after --: more options of python -m train")
    args = parser.parse_args(words)
    args.seconds = args.seconds or (38 if args.probe else 300)
    args.methods = args.methods.split(",")
    if unknown := [method for method in args.methods if method not in METHODS]:
        parser.error(f"--methods: expected some of {', '.join(METHODS)}, got {', '.join(unknown)}")
    if args.epochs < 2:
        parser.error(f"--epochs: expected at least 2, one per stage, got {args.epochs}")
    args.folder = args.folder.resolve()
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = parse(words)
    args.folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []

    def emit(record: Record) -> None:
        lines.append(json.dumps(record))
        print(lines[-1], flush=True)
        write_atomically(
            args.folder / "results.jsonl",
            lambda path: path.write_text("\n".join(lines) + "\n", encoding="utf-8"),
        )

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)  # the training processes are asked to save in this case too
    if args.probe:
        from .probe import probe

        return probe(args, unpack(args.data, args.folder, args.unpacker), emit)
    return run(args, emit)
