"""One measurement: processes of a gloo group take steps of a sharded head, and the first one writes the results."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from gistops.distributed import shard_classes
from gistops.nn import ConstellationClassifier

from ..cpu.memory import read_status, reset_peak
from ..problem import Size
from .collectives import Recorder, bytes_sent
from .model import Case

LEARNING_RATE = 0.1
MOMENTUM = 0.9


def run(case: Case, seconds: float, folder: Path) -> dict[str, Any]:
    """Measure a case in new processes.

    Args:
        case: the problem; its rows are divided between the processes.
        seconds: the time of all steps, of which there are at least two and at most twenty after one that is not timed. With
            several processes, as many more are recorded.
        folder: an empty folder for the rendezvous and the results.
    """
    context = mp.start_processes(
        _begin, (case, seconds, str(folder)), nprocs=case.ranks, join=False, start_method="spawn"
    )
    assert context is not None
    while not context.join():  # if a process failed, raises and ends the others
        pass
    found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return found


def _begin(rank: int, case: Case, seconds: float, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # independent of the host name
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=case.ranks)
    mine = measure(case, seconds)
    everyone: list[Any] = [None] * case.ranks
    dist.all_gather_object(everyone, mine)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(joined(everyone)), encoding="utf-8")
    gc.collect()  # tensors in reference cycles must not outlive the group
    dist.destroy_process_group()
    time.sleep(0.2)  # gloo's threads free their last tensors: if Python has ended, they abort the process


class Steps:
    """Training steps of one process, with their times."""

    def __init__(self, case: Case) -> None:
        size, rank = case.size, dist.get_rank()
        mesh = init_device_mesh("cpu", (case.ranks,))
        head = ConstellationClassifier(size.d, size.K, size.m, device="meta")
        self.head = shard_classes(head, mesh, seed=0)
        self.optimizer = torch.optim.SGD(self.head.parameters(), LEARNING_RATE, MOMENTUM)
        generator = torch.Generator().manual_seed(rank)
        rows = size.B // case.ranks + (rank < size.B % case.ranks)
        self.x = torch.randn(rows, size.d, generator=generator).requires_grad_()
        self.y: Tensor = torch.randint(size.K, (rows,), generator=generator)

    def loss(self) -> tuple[float, float]:
        """Compute the loss and the gradients, and return the seconds and this thread's seconds of CPU time.

        The thread computes everything. CPU time leaves out the time in which it waits for collectives, or for a core.
        """
        dist.barrier()
        begin, busy = time.perf_counter(), time.thread_time()
        self.head.loss(self.x, self.y).backward()
        return time.perf_counter() - begin, time.thread_time() - busy

    def update(self) -> float:
        """Step the optimizer, and return this thread's seconds of CPU time."""
        begin = time.thread_time()
        self.optimizer.step()
        seconds = time.thread_time() - begin
        self.optimizer.zero_grad()
        self.x.grad = None
        return seconds


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """Return the results of this process."""
    small = Steps(Case(Size(8, 128 * case.ranks, case.size.d, case.size.m), case.ranks))
    small.loss()  # loads the kernels and starts the threads of gloo
    small.update()
    del small
    before = resting_memory()
    tried = Steps(case)
    resting_memory()  # drawing the centers takes more memory than they do
    steps = torch.tensor(seconds / tried.loss()[0])
    dist.all_reduce(steps, dist.ReduceOp.MIN)
    peak_of_loss = read_status("VmHWM") - before
    tried.update()
    found: dict[str, Any] = {"seconds": [], "work": [], "optimizer": [], "waiting": [], "transfer": []}
    for _ in range(int(steps.clamp(2, 20))):
        sent = bytes_sent()
        elapsed, busy = tried.loss()
        found["sent"] = bytes_sent() - sent
        found["seconds"].append(elapsed)
        found["work"].append(busy)
        found["optimizer"].append(tried.update())
        if case.ranks == 1:
            continue
        with Recorder() as recorder:
            tried.loss()
        tried.update()
        found["waiting"].append(sum(call.waiting for call in recorder.calls))
        found["transfer"].append(sum(call.transfer for call in recorder.calls))
        found["collectives"] = [(call.kind, call.bytes) for call in recorder.calls]
    return found | {"peak of loss": peak_of_loss, "peak": read_status("VmHWM") - before}


def resting_memory() -> int:
    """Return freed memory to the system, reset the peak and return the resident bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return reset_peak()


def joined(everyone: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the results of the processes: of times, those of the slowest process; of waiting and transfer, means."""
    found = {
        name: [max(step) for step in _steps(everyone, name)] for name in ("seconds", "work", "optimizer")
    }
    found |= {
        name: [statistics.mean(step) for step in _steps(everyone, name)] for name in ("waiting", "transfer")
    }
    largest = {name: max(mine[name] for mine in everyone) for name in ("sent", "peak of loss", "peak")}
    return found | largest | {"collectives": everyone[0].get("collectives", [])}


def _steps(everyone: list[dict[str, Any]], name: str) -> list[tuple[float, ...]]:
    """Return the values of each step in all processes."""
    return list(zip(*(mine[name] for mine in everyone), strict=True))
