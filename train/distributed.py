"""Collectives over the processes of a run, which torchrun starts. With a single process they do nothing."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .options import ConfigError

T = TypeVar("T")
SECONDS_FOR_GLOO = 0.2

#: What torchrun, or a script of a scheduler, sets in the environment of each process.
ENVIRONMENT = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

#: A group with a long timeout, because other processes may wait for hours while one decodes all images.
_patient_group: dist.ProcessGroup | None = None


class WrongEnvironment(ConfigError):
    """A process of several, as its environment says, which torchrun has not started."""

    def __init__(self, got: str) -> None:
        expected = f"{', '.join(ENVIRONMENT)} as torchrun sets them, or no WORLD_SIZE for one process"
        Exception.__init__(self, f"environment: expected {expected}, got {got}")


@contextmanager
def init_process_group() -> Iterator[None]:
    """Initialize torch.distributed if torchrun started this process: gloo for the CPU, NCCL for one GPU per process.

    Raises:
        WrongEnvironment: WORLD_SIZE, which schedulers set too, is there without the rest of what torchrun sets.
    """
    global _patient_group
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    if missing := [name for name in ENVIRONMENT if not os.environ.get(name)]:
        raise WrongEnvironment(f"WORLD_SIZE={os.environ['WORLD_SIZE']} without {', '.join(missing)}")
    if (local_rank := int(os.environ["LOCAL_RANK"])) < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    _patient_group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    try:
        yield
        _patient_group = None
        gc.collect()  # a DDP wrapper in a reference cycle would abort the process if it outlived the group
        dist.destroy_process_group()  # not after an error: other processes may not get here, and torchrun ends them
    finally:  # gloo's threads need the interpreter to free their last tensors. If it has ended, they abort the process.
        time.sleep(SECONDS_FOR_GLOO)


def is_initialized() -> bool:
    """Return whether there are several processes."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if is_initialized() else 1


@contextmanager
def local_rank0_first() -> Iterator[None]:
    """Let local rank 0 run the context's body first, then the other processes of the machine, which find its results."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if is_initialized() and not first:
        dist.barrier(_patient_group)
    yield
    if is_initialized() and first:
        dist.barrier(_patient_group)


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 and return its result on all ranks, or raise its ConfigError on all ranks."""
    if not is_initialized():
        return make()
    objects: list[Any] = [None]
    if rank() == 0:
        try:
            objects = [make()]
        except ConfigError as error:
            objects = [error]
    dist.broadcast_object_list(objects, group=_patient_group)
    if isinstance(objects[0], ConfigError):
        raise objects[0]
    result: T = objects[0]
    return result


def all_reduce_sum(value: Tensor) -> Tensor:
    """Return the sum of the processes' tensors, which have the same shape."""
    if is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value


def largest(value: int) -> int:
    """Return the largest of the processes' values."""
    if not is_initialized():
        return value
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_patient_group)
    return int(tensor)


def all_gather(value: Tensor) -> list[Tensor]:
    """Return the tensors of all processes, which have the same shape."""
    if not is_initialized():
        return [value]
    values = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(values, value)
    return values


def all_gather_rows(value: Tensor) -> list[Tensor]:
    """Return the tensors of all processes. Their numbers of rows may differ."""
    sizes = [int(size) for size in all_gather(torch.tensor([len(value)]))]
    padding = value.new_zeros(max(sizes) - len(value), *value.shape[1:])
    parts = all_gather(torch.cat([value, padding]))
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]
