"""The processes of a run: one, or those that `torchrun` starts, which all see the data and take a part of each step."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

#: For waiting until one process has decoded all images, which may take hours.
_patient: dist.ProcessGroup | None = None


@contextmanager
def init_process_group() -> Iterator[None]:
    """Join the processes that torchrun started, if it did: by gloo on the CPU, by NCCL on GPUs, each on its own."""
    global _patient
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    if (own := int(os.environ["LOCAL_RANK"])) < torch.cuda.device_count():
        torch.cuda.set_device(own)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    _patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    yield
    _patient = None
    gc.collect()  # what wrapped a model may lie in a cycle, and would abort the process if it outlived the group
    dist.destroy_process_group()  # not after an error: the others may not come to it, and torchrun ends them


def is_initialized() -> bool:
    """Whether there are others."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if is_initialized() else 1


@contextmanager
def local_rank0_first() -> Iterator[None]:
    """What one process of a machine does before its others, which then find it done."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if is_initialized() and not first:
        dist.barrier(_patient)
    yield
    if is_initialized() and first:
        dist.barrier(_patient)


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, in all of them."""
    if not is_initialized():
        return make()
    made = [make() if rank() == 0 else None]
    dist.broadcast_object_list(made, group=_patient)
    return made[0]  # type: ignore[return-value]


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum over all processes, of tensors of one shape."""
    if is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value


def all_gather(value: Tensor) -> list[Tensor]:
    """Every process's tensor, of one shape and on the CPU."""
    if not is_initialized():
        return [value]
    every = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(every, value)
    return every
