"""Training steps as CUDA graphs.

A step of a small network launches about 700 kernels of a few microseconds each, and the GPU waits for the CPU to launch
them. A CUDA graph launches all of them at once. Values that change from step to step are in tensors with fixed addresses:
the samples' indices, the random numbers, the learning rates. The samples themselves are on the GPU.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import distributed
from ..data.stream.batches import MicroBatchDraw

if TYPE_CHECKING:
    from .trainer import Trainer

WARM_UP_STEPS = (
    3  # before the capture, to load kernels and to allocate workspaces and the optimizer's momentum
)

Step = Callable[[], Tensor]


def graphed_steps(trainer: Trainer) -> GraphedSteps | None:
    """Return graphed steps if --cuda-graph asks for them and they are possible; warn if they are not possible."""
    if not trainer.config.runtime.cuda_graph:
        return None
    obstacles = {
        f"CUDA graphs are not available on {trainer.device.type}": trainer.device.type != "cuda",
        "not supported with several processes": distributed.is_initialized(),
        "not supported with fp16, whose gradient scaler reads a value in each step": trainer.scaler.is_enabled(),
        f"not supported by {trainer.name}, whose work depends on the labels": not trainer.method.capturable,
        "the samples do not fit on the GPU": trainer.batches.x.device != trainer.device,
    }
    for obstacle, holds in obstacles.items():
        if holds:
            message = f"--cuda-graph: {obstacle}, so kernels are launched one by one"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
            return None
    return GraphedSteps(trainer)


class GraphedSteps:
    """The steps of a stage. After a few warm-up steps, steps of the usual size are replayed from a graph.

    Steps of other sizes, such as the last one of an epoch, are launched kernel by kernel. If a capture fails, all
    steps are launched kernel by kernel, and a warning is given.

    Args:
        trainer: the trainer, at any step of the stage.
        capture: makes a repeatable call from a step; for tests.
    """

    def __init__(self, trainer: Trainer, capture: Callable[[Step], Step] | None = None) -> None:
        self._trainer = trainer
        self._capture = capture or functools.partial(capture_graph, device=trainer.device)
        self._usual_size = trainer.batches.sizes[0]
        self._warm_up_steps = 0
        self._failed = False
        self._replay: Step | None = None
        self._static_draws: list[MicroBatchDraw] = []
        self._learning_rates: list[Tensor] = []
        self._side_stream = torch.cuda.Stream(trainer.device) if trainer.device.type == "cuda" else None

    @property
    def captured(self) -> bool:
        """Return True after a graph has been captured."""
        return self._replay is not None

    def step(self, draws: list[MicroBatchDraw], size: tuple[int, int]) -> Tensor:
        """Take a step; return the loss, in a tensor that the next step may overwrite.

        Args:
            draws: the draws of the step's micro-batches.
            size: the numbers of samples of the balanced and of the random stream.
        """
        if size != self._usual_size or self._failed:
            return self._launch(draws)
        if self._warm_up_steps < WARM_UP_STEPS:
            self._warm_up_steps += 1
            return self._launch_on_side_stream(draws)
        if self._replay is None and not self._try_capture(draws):
            return self._launch(draws)
        assert self._replay is not None
        for static, new in zip(self._static_draws, draws, strict=True):
            for target, value in zip(static.tensors, new.tensors, strict=True):
                target.copy_(value.pin_memory() if target.is_cuda else value, non_blocking=True)
        for rate, group in zip(self._learning_rates, self._trainer.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        return self._replay()

    def _launch(self, draws: list[MicroBatchDraw]) -> Tensor:
        return self._trainer.optimize([self._trainer.batches.materialize(draw) for draw in draws])

    def _launch_on_side_stream(self, draws: list[MicroBatchDraw]) -> Tensor:
        """Launch a warm-up step on another stream, as PyTorch requires before a capture."""
        if self._side_stream is None:
            return self._launch(draws)
        current = torch.cuda.current_stream(self._trainer.device)
        self._side_stream.wait_stream(current)
        with torch.cuda.stream(self._side_stream):
            loss = self._launch(draws)
        current.wait_stream(self._side_stream)
        return loss

    def _try_capture(self, draws: list[MicroBatchDraw]) -> bool:
        """Capture a step without running it; return whether it succeeded."""
        device, optimizer = self._trainer.device, self._trainer.optimizer
        on_device = [draw.to(device) for draw in draws]
        self._static_draws = [draw.with_tensors(*(t.clone() for t in draw.tensors)) for draw in on_device]
        self._learning_rates = [
            torch.zeros((), dtype=torch.float32, device=device) for _ in optimizer.param_groups
        ]
        try:
            self._replay = self._capture(self._static_step)
        except Exception as error:  # any failure: training can continue without a graph
            self._failed = True
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            warnings.warn(
                f"--cuda-graph: a step could not be captured, so kernels are launched one by one, which is slower ({reason})",
                RuntimeWarning,
                stacklevel=3,
            )
        return self._replay is not None

    def _static_step(self) -> Tensor:
        with tensor_learning_rates(self._trainer.optimizer, self._learning_rates):
            return self._launch(self._static_draws)


@contextmanager
def tensor_learning_rates(optimizer: torch.optim.Optimizer, rates: list[Tensor]) -> Iterator[None]:
    """Let the optimizer read its learning rates from tensors, so that a captured step uses their later values."""
    values = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    try:
        yield
    finally:
        for group, value in zip(optimizer.param_groups, values, strict=True):
            group["lr"] = value


def capture_graph(step: Step, device: torch.device) -> Step:
    """Capture a step as a CUDA graph, without running it; return a call that replays it and returns the same loss tensor.

    Args:
        step: the step.
        device: the GPU of its tensors, which need not be the current one: kernels on another GPU would be launched at once,
            and the graph would be empty.
    """
    with torch.cuda.device(device):
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads, such as that of a progress bar, may call CUDA during the capture.
            with torch.cuda.graph(graph, stream=_capture_stream(device), capture_error_mode="thread_local"):
                loss = step()
        except BaseException:
            torch.cuda.set_stream(stream)  # a failed capture may leave its own stream as the current one
            raise

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a stream for all captures on a GPU. torch's own is on the GPU of the first capture."""
    return torch.cuda.Stream(device)
