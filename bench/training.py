"""Steps of training taken apart: what the input, the backbone and the head cost, with each of several backends.

    python -m bench.training --recipe cifar100-lt --data FILE --backends auto reference
    python -m bench.training --recipe features --data counts.json --made-up-features 2048

The first takes the options of `python -m train`, but for those of precision, parts and compilation. The second makes
features up, normal ones, for a set with the class counts that a JSON file lists under "counts": a load test of the head
alone. Heads take steps in turn, in one process; times are medians of the steps. The step is that of train/training.py,
but that the features' gradient halts between the head and the backbone. What a part adds to memory at its peak is told
apart; what is held between steps is of all heads together, and what each head's training added when it was made.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from train.cli import from_command_line
from train.config import Config, ConfigError, MethodName, check
from train.console import say
from train.data.dataset import Dataset
from train.run import load
from train.training.trainer import Training

from .cpu.memory import read_status, reset_peak
from .hardware import hardware

PARTS = ("input", "backbone forward", "head", "backbone backward", "optimizer")
UNMEASURED = {"precision": "float32", "accumulate": 1, "compile": False, "batch_norm": "joint"}
BackendName = Literal["auto", "cpu", "cuda", "triton", "reference"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured(Config):
    """Every option of a run, and what is measured of it."""

    backends: tuple[BackendName, ...] = ("auto", "reference")
    """The heads' backends, each in turn."""
    steps: int = 20
    """Steps of each that count, after three that do not."""
    method: MethodName = "gist"
    """What is trained, in its last stage."""
    made_up_features: int | None = None
    """Length of features that are made up, for the class counts in the JSON file --data."""


class Parts:
    """Seconds of each part of a step, and bytes that it adds at its peak to what the process holds between steps."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = {part: [] for part in PARTS}
        self.peaks: dict[str, int] = dict.fromkeys(PARTS, 0)
        self.resting = 0

    def take(self, part: str, run: Callable[[], Any]) -> Any:
        """What `run` returns, timed."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            reset_peak()
        begin = time.perf_counter()
        result = run()
        if on_gpu:
            torch.cuda.synchronize()
        self.seconds[part].append(time.perf_counter() - begin)
        peak = torch.cuda.max_memory_allocated() if on_gpu else read_status("VmHWM")
        self.peaks[part] = max(self.peaks[part], peak - self.resting)
        return result

    def rest(self) -> None:
        """Between two steps."""
        self.resting = torch.cuda.memory_allocated() if self.device.type == "cuda" else read_status("VmRSS")

    def forget(self) -> None:
        """The steps so far do not count."""
        self.__init__(self.device)  # type: ignore[misc]
        self.rest()

    def medians(self) -> dict[str, float]:
        return {part: statistics.median(seconds) for part, seconds in self.seconds.items()}


def step(training: Training, parts: Parts) -> None:
    """One step of training, part by part."""
    (part,) = parts.take("input", training.batches.next)
    training.optimizer.zero_grad()
    features: Tensor = parts.take("backbone forward", lambda: training.model.features(part.x))
    halted = features.detach().requires_grad_()

    def head() -> None:
        losses = training.method.losses(training.model.head, halted, part.y, part.num_balanced)
        torch.stack([training.method.weights[name] * loss for name, loss in losses.items()]).sum().backward()

    parts.take("head", head)
    if features.requires_grad:
        parts.take("backbone backward", lambda: features.backward(halted.grad))
    else:
        parts.take("backbone backward", lambda: None)
    parts.take("optimizer", training.optimizer.step)
    parts.rest()


def made_up(counts: Tensor, features: int, seed: int) -> Dataset:
    """Normal features [n, d] with as many samples of each class; a few to test with."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), counts)
    x = torch.randn(len(labels), features, generator=generator)
    names = [str(k) for k in range(len(counts))]
    return Dataset(x, labels, x[:10], labels[:10], names, counts)


def data_of(config: Measured) -> Dataset:
    if config.made_up_features is None:
        return load(config)
    try:
        counts = torch.tensor(json.loads(Path(config.data).read_text())["counts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("data", "a JSON file with class counts", f"{config.data} ({error})") from None
    return made_up(counts, config.made_up_features, config.seed)


def measure(config: Measured) -> dict[str, Parts]:
    """Parts of the steps with each backend."""
    for option, plain in UNMEASURED.items():
        if getattr(config, option) != plain:
            raise ConfigError(option, f"{plain}, as steps are taken apart", repr(getattr(config, option)))
    data = data_of(config)
    trainings: dict[str, tuple[Training, Parts]] = {}
    for backend in config.backends:
        own = dataclasses.replace(config, backend=backend)
        check(own)
        training = Training(config.method, own, data)
        training.begin_stage(len(training.method.stages) - 1)
        trainings[backend] = training, Parts(training.device)
    for count in range(3 + config.steps):
        for training, parts in trainings.values():
            if count == 3:
                parts.forget()
            parts.rest()
            step(training, parts)
    return {backend: parts for backend, (_, parts) in trainings.items()}


def show(config: Measured, found: dict[str, Parts], console: Console) -> None:
    table = Table(title=f"{config.method} on {config.data}, medians of {config.steps} steps")
    table.add_column("")
    for backend in found:
        table.add_column(f"{backend}: ms", justify="right")
        table.add_column("peak MiB", justify="right")
    for part in PARTS:
        cells = []
        for parts in found.values():
            cells += [f"{1e3 * parts.medians()[part]:,.1f}", f"{parts.peaks[part] / 2**20:,.0f}"]
        table.add_row(part, *cells)
    totals = []
    for parts in found.values():
        total = sum(parts.medians().values())
        totals += [f"{1e3 * total:,.1f} ({1 / total:,.2f} steps/s)", f"{parts.resting / 2**20:,.0f} held"]
    table.add_row("step", *totals)
    console.print(table)


def main(args: list[str] | None = None) -> int:
    try:
        config = from_command_line(args, Measured)
        console = Console()
        if config.threads:
            torch.set_num_threads(config.threads)
        say(console, hardware())
        show(config, measure(config), console)
        return 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
