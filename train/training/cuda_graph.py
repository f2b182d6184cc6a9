"""A whole step of training as one CUDA graph.

A step of a small network is some seven hundred kernels of a few microseconds each: a GPU waits for the CPU that launches them.
Held in a graph they are one launch. What differs from step to step goes through tensors that stay where they are: the samples'
indices, the random numbers, the learning rates. The samples themselves lie on the GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from ..data.stream.batches import Batches, MicroBatch, MicroBatchDraw

WARM_UP = 3  # steps before one is captured: lazily loaded kernels, workspaces, the optimizer's momentum

Step = Callable[[], Tensor]


class Trained(Protocol):
    """The attributes of `training.Training` that a graph needs."""

    device: torch.device
    batches: Batches

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Whose groups have rates, as numbers."""

    def optimize(self, parts: list[MicroBatch]) -> Tensor:
        """Take a step on these samples, without the CPU waiting for anything; returns the loss."""


class GraphedSteps:
    """The steps of a stage. The first few are taken as ever, then those of the usual size are replayed from a graph.

    Others, such as an epoch's last one, are still launched kernel by kernel. Where a step cannot be captured, a warning says
    so and all are.

    Args:
        training: what is trained, at the beginning of the stage or anywhere in it.
        capture: makes of a step what repeats it; for tests.
    """

    def __init__(self, training: Trained, capture: Callable[[Step], Step] | None = None) -> None:
        self._training, self._capture = training, capture or captured
        self._usual = training.batches.sizes[0]
        self._warm = 0
        self._given_up = False
        self._replay: Step | None = None
        self._inputs: list[MicroBatchDraw] = []
        self._rates: list[Tensor] = []
        self._aside = torch.cuda.Stream(training.device) if training.device.type == "cuda" else None

    @property
    def captured(self) -> bool:
        """True if steps are replayed by now."""
        return self._replay is not None

    def step(self, drawn: list[MicroBatchDraw], size: tuple[int, int]) -> Tensor:
        """Take a step on what was drawn, of so many samples of each stream; returns the loss, until the next one's."""
        if size != self._usual or self._given_up:
            return self._launch(drawn)
        if self._warm < WARM_UP:
            self._warm += 1
            return self._beside(drawn)
        if self._replay is None and not self._record(drawn):
            return self._launch(drawn)
        assert self._replay is not None
        for static, new in zip(self._inputs, drawn, strict=True):
            for to, value in zip(static.tensors, new.tensors, strict=True):
                to.copy_(value.pin_memory() if to.is_cuda else value, non_blocking=True)
        self._set_rates()
        return self._replay()

    def _launch(self, drawn: list[MicroBatchDraw]) -> Tensor:
        return self._training.optimize([self._training.batches.materialize(part) for part in drawn])

    def _beside(self, drawn: list[MicroBatchDraw]) -> Tensor:
        """On another stream, as PyTorch asks of steps before a capture."""
        if self._aside is None:
            return self._launch(drawn)
        here = torch.cuda.current_stream(self._training.device)
        self._aside.wait_stream(here)
        with torch.cuda.stream(self._aside):
            loss = self._launch(drawn)
        here.wait_stream(self._aside)
        return loss

    def _record(self, drawn: list[MicroBatchDraw]) -> bool:
        """Capture a step, which takes none; returns whether it could be."""
        device = self._training.device
        on_device = [draw.to(device) for draw in drawn]
        self._inputs = [draw.with_tensors(*(t.clone() for t in draw.tensors)) for draw in on_device]
        self._rates = [
            torch.zeros((), dtype=torch.float32, device=device) for _ in self._training.optimizer.param_groups
        ]
        try:
            self._replay = self._capture(self._held)
        except Exception as error:  # whatever it is, the run can go on
            self._given_up = True
            said = f"{type(error).__name__}: {error}".partition("\n")[0]
            warnings.warn(
                f"--cuda-graph: a step could not be captured, so all are launched kernel by kernel, slower ({said})",
                RuntimeWarning,
                stacklevel=3,
            )
        return self._replay is not None

    def _held(self) -> Tensor:
        with rates_in(self._training.optimizer, self._rates):
            return self._launch(self._inputs)

    def _set_rates(self) -> None:
        for rate, group in zip(self._rates, self._training.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])


@contextmanager
def rates_in(optimizer: torch.optim.Optimizer, rates: list[Tensor]) -> Iterator[None]:
    """Let the optimizer read its groups' rates from tensors, where a captured step finds those of later steps."""
    numbers = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    try:
        yield
    finally:
        for group, number in zip(optimizer.param_groups, numbers, strict=True):
            group["lr"] = number


def captured(step: Step) -> Step:
    """A call that repeats a step as a CUDA graph and returns its loss, always in the same tensor. Capturing runs nothing."""
    graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # Threads that draw nothing, such as a progress bar's, do not matter.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            loss = step()
    except BaseException:
        torch.cuda.set_stream(here)  # a capture that fails may leave its own one in place
        raise

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay
