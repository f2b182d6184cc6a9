"""Time and memory of the parts of a training step: input, backbone, head and optimizer, for several backends.

    python -m bench.training --recipe cifar100-lt --data FILE --backends auto reference
    python -m bench.training --recipe features --data counts.json --made-up-features 2048

The first command takes the options of `python -m train`, except precision, accumulation and compilation. The second
draws normal features for a dataset whose class counts a JSON file lists under "counts": a load test of the head alone.
The backends take alternating steps in one process, and times are medians over the steps. The step is that of
train/training/trainer.py, except that the backward runs in two parts, of the head and of the backbone. Peak memory is
reported per part, above the memory that the process holds between steps. This baseline includes all trainers.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from train.cli import check, parse
from train.config import Config, ConfigError, MethodName
from train.console import say
from train.data.dataset import Dataset
from train.run import load
from train.training.trainer import Trainer

from .cpu.memory import read_status, reset_peak
from .hardware import hardware

PARTS = ("input", "backbone forward", "head", "backbone backward", "optimizer")
UNMEASURED = {"precision": "float32", "accumulate": 1, "compile": False, "batch_norm": "joint"}
BackendName = Literal["auto", "cpu", "cuda", "triton", "reference"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured(Config):
    """The options of a run, and the options of the measurement."""

    #: The backends to compare.
    backends: tuple[BackendName, ...] = ("auto", "reference")
    #: Timed steps per backend, after three warm-up steps.
    steps: int = 20
    #: The method, in its last stage.
    measured_method: Annotated[MethodName, tyro.conf.arg(name="method")] = "gist"
    #: Length of random features, drawn for the class counts in the JSON file --data.
    made_up_features: int | None = None


class Parts:
    """Seconds per part of a step, and its peak memory above the memory that the process holds between steps."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = {part: [] for part in PARTS}
        self.peaks: dict[str, int] = dict.fromkeys(PARTS, 0)
        self.resting = 0

    def measure(self, part: str, run: Callable[[], Any]) -> Any:
        """Time `run` and return its result."""
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

    def record_resting_memory(self) -> None:
        """Record the memory that is held between two steps."""
        self.resting = torch.cuda.memory_allocated() if self.device.type == "cuda" else read_status("VmRSS")

    def reset(self) -> None:
        """Discard the steps so far."""
        self.__init__(self.device)  # type: ignore[misc]
        self.record_resting_memory()

    def medians(self) -> dict[str, float]:
        return {part: statistics.median(seconds) for part, seconds in self.seconds.items()}


def step(trainer: Trainer, parts: Parts) -> None:
    """Take one training step, part by part."""
    (part,) = parts.measure("input", trainer.batches.next)
    trainer.optimizer.zero_grad()
    features: Tensor = parts.measure("backbone forward", lambda: trainer.model.features(part.x))
    detached = features.detach().requires_grad_()

    def head() -> None:
        losses = trainer.method.losses(trainer.model.head, detached, part.y, part.num_balanced)
        torch.stack(
            [trainer.method.loss_coefficients[name] * loss for name, loss in losses.items()]
        ).sum().backward()

    parts.measure("head", head)
    if features.requires_grad:
        parts.measure("backbone backward", lambda: features.backward(detached.grad))
    else:
        parts.measure("backbone backward", lambda: None)
    parts.measure("optimizer", trainer.optimizer.step)
    parts.record_resting_memory()


def random_features(counts: Tensor, features: int, seed: int) -> Dataset:
    """Draw normal features with the given number of samples per class, and a few test samples."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), counts)
    x = torch.randn(len(labels), features, generator=generator)
    names = [str(k) for k in range(len(counts))]
    return Dataset(x, labels, x[:10], labels[:10], names, counts)


def load_data(config: Measured) -> Dataset:
    if config.made_up_features is None:
        return load(config)
    try:
        counts = torch.tensor(json.loads(Path(config.data.data).read_text(encoding="utf-8"))["counts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("data", "a JSON file with class counts", f"{config.data.data} ({error})") from None
    return random_features(counts, config.made_up_features, config.run.seed)


def measure(config: Measured) -> dict[str, Parts]:
    """Measure the parts of a step with each backend."""
    for option, plain in UNMEASURED.items():
        if (value := config.options()[option]) != plain:
            raise ConfigError(option, f"{plain}, because steps are measured in parts", repr(value))
    data = load_data(config)
    trainers: dict[str, tuple[Trainer, Parts]] = {}
    for backend in config.backends:
        backend_config = config.replace(backend=backend)
        check(backend_config)
        trainer = Trainer(config.measured_method, backend_config, data)
        trainer.begin_stage(len(trainer.method.stages) - 1)
        trainers[backend] = trainer, Parts(trainer.device)
    for count in range(3 + config.steps):
        for trainer, parts in trainers.values():
            if count == 3:
                parts.reset()
            parts.record_resting_memory()
            step(trainer, parts)
    return {backend: parts for backend, (_, parts) in trainers.items()}


def show(config: Measured, found: dict[str, Parts], console: Console) -> None:
    table = Table(title=f"{config.measured_method} on {config.data.data}, medians of {config.steps} steps")
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
        config = parse(args, Measured, "python -m bench.training")
        console = Console()
        if config.runtime.threads:
            torch.set_num_threads(config.runtime.threads)
        say(console, hardware())
        show(config, measure(config), console)
        return 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
