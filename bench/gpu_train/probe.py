"""`bench.gpu_train --probe`: the time of a training step in each launch mode, and whether the losses agree.

For each mode it prints a JSON line with the milliseconds per step (wall clock over steps that are synchronized once, at
the end), the CPU's launch time per step, the losses of some steps (the same weights and samples in every mode, so the
losses differ by rounding alone) and the GPU's peak memory. Another line lists the kernels of a step that is not captured
in a graph. The compiled modes come last because compiling may exceed the time limit. In this case the last line names
the mode that was not measured. --ways selects modes, --seconds is the time limit, --compile-cache keeps compiled code.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from train.cli import parse_run
from train.data.dataset import Dataset
from train.run import load
from train.training.trainer import Trainer

from .environment import compile_cache_env, save_compile_cache
from .jobs import Record, data_options

WARM_UP_STEPS, STEPS = 10, 30  # capturing a graph takes four steps of the warm-up
SHOWN_LOSSES = (0, 4, 9, 19, 29, 39)

#: Launch mode -> the options of train that it sets, and whether cuDNN benchmarks its kernels.
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "eager": ({}, False),
    "graph": ({"cuda_graph": True}, False),
    "graph+benchmark": ({"cuda_graph": True}, True),
    "compile+graph": ({"compile": True, "cuda_graph": True}, False),
    "compile": ({"compile": True}, False),
}


def probe(args: argparse.Namespace, data_file: Path | None, emit: Callable[[Record], None]) -> int:
    """Measure the launch modes. Ends the process if the time is up."""
    os.environ.update(compile_cache_env(args.compile_cache))
    began, way = time.monotonic(), "the beginning"

    def time_is_up() -> None:
        emit({"event": "probe", "way": way, "error": f"not done within {args.seconds:.0f} s"})
        save_compile_cache(args.compile_cache)
        sys.stdout.flush()
        os._exit(0)  # does not wait for threads that still compile

    timer = threading.Timer(args.seconds, time_is_up)
    timer.daemon = True
    timer.start()
    words = [*data_options(args, data_file), *args.options]
    words += ["--precision", args.precision, "--device", args.device, "--threads", str(args.threads)]
    # No clustering: the time of a step does not depend on the values of the displacements.
    words += ["--displacement-update", "gradient", "--transfer-directions", "0"]
    base = parse_run(words)
    torch.set_num_threads(args.threads)
    data = load(base)
    method = args.methods[0]
    for way in (args.ways or ",".join(WAYS)).split(","):
        options, benchmark = WAYS[way]
        torch.backends.cudnn.benchmark = benchmark
        config = base.replace(**options)
        try:
            record = _measure(method, config, data)
        except Exception as error:  # the other modes are still measured
            record = {"error": f"{type(error).__name__}: {error}"[:500]}
        at = round(time.monotonic() - began, 1)
        emit({"event": "probe", "way": way, "method": method, **record, "at": at})
        if way in ("eager", "compile") and torch.device(base.runtime.resolved_device).type == "cuda":
            emit({"event": "kernels", "way": way, **_kernels(method, config, data)})
    timer.cancel()
    save_compile_cache(args.compile_cache)
    return 0


def _start_last_stage(method: str, config: Any, data: Dataset) -> Trainer:
    """Return a training at the start of its last stage, with displacements."""
    trainer = Trainer(method, config, data)
    if len(trainer.method.stages) > 1:
        trainer.begin_stage(1)
    return trainer


def _step(trainer: Trainer) -> torch.Tensor:
    if trainer.step_of_epoch == trainer.steps_per_epoch - 1:  # skip the epoch's last step: its size differs
        trainer.step_of_epoch = 0
        trainer.batches.next_draws()
    return trainer.step()


def _measure(method: str, config: Any, data: Dataset) -> dict[str, Any]:
    """Return the times, the losses and the warnings of one launch mode."""
    on_gpu = torch.device(config.runtime.resolved_device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        began = time.perf_counter()
        trainer = _start_last_stage(method, config, data)
        losses = [_step(trainer).clone() for _ in range(WARM_UP_STEPS)]
        trainer.synchronize()
        ready = time.perf_counter()
        losses += [_step(trainer).clone() for _ in range(STEPS)]
        launched = time.perf_counter()
        trainer.synchronize()
        done = time.perf_counter()
    replayed = trainer.graphed is not None and trainer.graphed.captured
    line: dict[str, Any] = {
        "ms_per_step": round(1e3 * (done - ready) / STEPS, 3),
        "launch_ms_per_step": round(1e3 * (launched - ready) / STEPS, 3),
        "warm_up_seconds": round(ready - began, 2),
        "replayed": replayed,
        "losses": [round(float(losses[i]), 4) for i in SHOWN_LOSSES],
    }
    if on_gpu:
        line["peak_MiB"] = torch.cuda.max_memory_allocated() // 2**20
    if messages := sorted({str(warning.message).split("\n")[0][:300] for warning in warned}):
        line["warned"] = messages
    return line


def _kernels(method: str, config: Any, data: Dataset) -> dict[str, Any]:
    """Return the number of kernels of an eager step, their total time, and the longest ones."""
    from torch.profiler import ProfilerActivity, profile

    trainer = _start_last_stage(method, config, data)
    for _ in range(WARM_UP_STEPS):
        _step(trainer)
    trainer.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(3):
            _step(trainer)
        trainer.synchronize()
    rows = [(e.key, e.self_device_time_total / 3e3, e.count / 3) for e in profiled.key_averages()]
    rows = sorted((row for row in rows if row[1] > 0), key=lambda row: -row[1])
    return {
        "launches_per_step": round(sum(count for _, _, count in rows)),
        "gpu_ms_per_step": round(sum(ms for _, ms, _ in rows), 3),
        "longest": [[name[:90], round(ms, 4), round(count, 1)] for name, ms, count in rows[:25]],
    }
