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


def run(case: Case, steps: int, folder: Path) -> dict[str, Any]:
    """Measure a case in new processes.

    Args:
        case: the problem; its rows are divided between the processes.
        steps: timed steps, after one that is not timed. Where there are several processes, as many more are recorded.
        folder: an empty folder for the rendezvous and the results.
    """
    context = mp.start_processes(
        _begin, (case, steps, str(folder)), nprocs=case.ranks, join=False, start_method="spawn"
    )
    assert context is not None
    while not context.join():  # if a process failed, raises and ends the others
        pass
    found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return found


def _begin(rank: int, case: Case, steps: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # independent of the host name
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=case.ranks)
    mine = measure(case, steps)
    everyone: list[Any] = [None] * case.ranks
    dist.all_gather_object(everyone, mine)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(joined(everyone)), encoding="utf-8")
    gc.collect()  # tensors in reference cycles must not outlive the group
    dist.destroy_process_group()


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

    def loss(self) -> float:
        """Compute the loss and the gradients, and return the seconds."""
        dist.barrier()
        begin = time.perf_counter()
        self.head.loss(self.x, self.y).backward()
        return time.perf_counter() - begin

    def update(self) -> float:
        """Step the optimizer, and return the seconds."""
        begin = time.perf_counter()
        self.optimizer.step()
        seconds = time.perf_counter() - begin
        self.optimizer.zero_grad()
        self.x.grad = None
        return seconds


def measure(case: Case, steps: int) -> dict[str, Any]:
    """Return the results of this process."""
    small = Steps(Case(Size(8, 128 * case.ranks, case.size.d, case.size.m), case.ranks))
    small.loss()  # loads the kernels and starts the threads of gloo
    small.update()
    del small
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = reset_peak()
    tried = Steps(case)
    reset_peak()  # drawing the centers takes more memory than they do
    tried.loss()
    peak_of_loss = read_status("VmHWM") - before
    tried.update()
    found: dict[str, Any] = {"seconds": [], "optimizer": [], "own": [], "waiting": [], "transfer": []}
    for _ in range(steps):
        sent = bytes_sent()
        found["seconds"].append(tried.loss())
        found["sent"] = bytes_sent() - sent
        found["optimizer"].append(tried.update())
        if case.ranks == 1:
            continue
        with Recorder() as recorder:
            seconds = tried.loss()
        tried.update()
        waiting, transfer = (
            sum(getattr(c, part) for c in recorder.calls) for part in ("waiting", "transfer")
        )
        found["own"].append(seconds - waiting - transfer)
        found["waiting"].append(waiting)
        found["transfer"].append(transfer)
        found["collectives"] = [(c.kind, c.bytes) for c in recorder.calls]
    return found | {"peak of loss": peak_of_loss, "peak": read_status("VmHWM") - before}


def joined(everyone: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the results of the processes: a step takes as long as in the slowest; its parts are means over processes."""
    found = {name: [max(step) for step in _steps(everyone, name)] for name in ("seconds", "optimizer")}
    found |= {
        name: [statistics.mean(step) for step in _steps(everyone, name)]
        for name in ("own", "waiting", "transfer")
    }
    largest = {name: max(mine[name] for mine in everyone) for name in ("sent", "peak of loss", "peak")}
    return found | largest | {"collectives": everyone[0].get("collectives", [])}


def _steps(everyone: list[dict[str, Any]], name: str) -> list[tuple[float, ...]]:
    """Return the values of each step in all processes."""
    return list(zip(*(mine[name] for mine in everyone), strict=True))
