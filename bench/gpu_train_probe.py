"""The cost of a step of training in each way that it can be launched, and whether the losses agree: `bench.gpu_train --probe`.

For each way a JSON line: milliseconds a step, from the clock over steps that were waited for in the end; the part of them that
the CPU took to launch; the losses of some steps, from the same weights and samples, which differ by rounding; the GPU's peak
memory. And one line for the kernels of a step that is launched one by one: how many, their time, and which take longest.
Compiled ways come last, as compiling may take longer than there is time: then the last line says which was not measured. --ways
chooses, --seconds is the time there is, and --compile-cache keeps what was compiled for the next call.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from train.cli import from_command_line
from train.data.dataset import Dataset
from train.run import load
from train.training.trainer import Training

from .gpu_train import of_data
from .gpu_train_env import compiled_env, pack

WARM, STEPS = 10, 30  # steps that do not count, of which a graph takes four; and that do
LOOKED = (0, 4, 9, 19, 29, 39)  # steps whose losses are shown

#: Ways to launch a step: options of train, and whether cuDNN measures its kernels.
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "eager": ({}, False),
    "graph": ({"cuda_graph": True}, False),
    "graph+benchmark": ({"cuda_graph": True}, True),
    "compile+graph": ({"compile": True, "cuda_graph": True}, False),
    "compile": ({"compile": True}, False),
}


def probe(args: argparse.Namespace, data_file: Path | None, say: Any) -> int:
    """Measure every way, as far as the time goes; does not return where it is up."""
    os.environ.update(compiled_env(args.compile_cache))
    began, at = time.monotonic(), ["the beginning"]

    def over() -> None:
        say({"event": "probe", "way": at[0], "error": f"not done within {args.seconds:.0f} s"})
        pack(args.compile_cache)
        sys.stdout.flush()
        os._exit(0)  # whatever compiles need not be waited for

    timer = threading.Timer(args.seconds, over)
    timer.daemon = True
    timer.start()
    words = [*of_data(args, data_file), *args.options]
    words += ["--precision", args.precision, "--device", args.device, "--threads", str(args.threads)]
    # No clustering: what a step costs does not depend on where displacements point.
    words += ["--displacement-update", "gradient", "--transfer-directions", "0"]
    config = from_command_line(words)
    torch.set_num_threads(args.threads)
    data = load(config)
    method = args.methods[0]
    for way in (args.ways or ",".join(WAYS)).split(","):
        at[0] = way
        options, benchmark = WAYS[way]
        torch.backends.cudnn.benchmark = benchmark
        config_of_way = dataclasses.replace(config, **options)
        try:
            line = measured(method, config_of_way, data)
        except Exception as error:  # the other ways are still to be measured
            line = {"error": f"{type(error).__name__}: {error}"[:500]}
        say(
            {"event": "probe", "way": way, "method": method, **line, "at": round(time.monotonic() - began, 1)}
        )
        if way in ("eager", "compile") and torch.device(config.device).type == "cuda":
            say({"event": "kernels", "way": way, **kernels(method, config_of_way, data)})
    timer.cancel()
    pack(args.compile_cache)
    return 0


def _begun(method: str, config: Any, data: Dataset) -> Training:
    """In its last stage, with displacements."""
    training = Training(method, config, data)
    if len(training.method.stages) > 1:
        training.begin_stage(1)
    return training


def _step(training: Training) -> torch.Tensor:
    if training.step_of_epoch == training.steps_per_epoch - 1:  # the last step is of another size
        training.step_of_epoch = 0
        training.batches.next_drawn()
    return training.step()


def measured(method: str, config: Any, data: Dataset) -> dict[str, Any]:
    """Milliseconds and losses of one way, and what it warned of."""
    on_gpu = torch.device(config.device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        began = time.perf_counter()
        training = _begun(method, config, data)
        losses = [_step(training).clone() for _ in range(WARM)]
        training.wait()
        ready = time.perf_counter()
        losses += [_step(training).clone() for _ in range(STEPS)]
        launched = time.perf_counter()
        training.wait()
        done = time.perf_counter()
    replayed = training.graphed is not None and training.graphed.captured
    line: dict[str, Any] = {
        "ms_per_step": round(1e3 * (done - ready) / STEPS, 3),
        "launch_ms_per_step": round(1e3 * (launched - ready) / STEPS, 3),
        "warm_up_seconds": round(ready - began, 2),
        "replayed": replayed,
        "losses": [round(float(losses[i]), 4) for i in LOOKED],
    }
    if on_gpu:
        line["peak_MiB"] = torch.cuda.max_memory_allocated() // 2**20
    if said := sorted({str(warning.message).split("\n")[0][:300] for warning in warned}):
        line["warned"] = said
    return line


def kernels(method: str, config: Any, data: Dataset) -> dict[str, Any]:
    """Of an eager step: how many kernels, how long they take together, and the longest."""
    from torch.profiler import ProfilerActivity, profile

    training = _begun(method, config, data)
    for _ in range(WARM):
        _step(training)
    training.wait()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(3):
            _step(training)
        training.wait()
    rows = [(e.key, e.self_device_time_total / 3e3, e.count / 3) for e in found.key_averages()]
    rows = sorted((row for row in rows if row[1] > 0), key=lambda row: -row[1])
    return {
        "launches_per_step": round(sum(count for _, _, count in rows)),
        "gpu_ms_per_step": round(sum(ms for _, ms, _ in rows), 3),
        "longest": [[name[:90], round(ms, 4), round(count, 1)] for name, ms, count in rows[:25]],
    }
