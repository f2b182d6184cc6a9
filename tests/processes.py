"""Functions that run in new processes with a process group.

A process that hangs is ended after SECONDS and prints its traceback.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 600


def in_group(function: Callable[..., object], size: int, folder: Path, *arguments: Any) -> None:
    """Call `function(rank, *arguments)` in each of `size` new processes with a gloo process group.

    Args:
        function: function of a module, so that the processes can import it.
        size: number of processes.
        folder: empty folder for their rendezvous.
        arguments: picklable values.

    Raises:
        Exception: the exception of a process, with its traceback; or the processes did not end in time.
    """
    context = mp.start_processes(
        begin, (function, size, str(folder), arguments), nprocs=size, join=False, start_method="spawn"
    )
    assert context is not None
    while not context.join():  # if a process failed, raises and ends the others
        pass


def begin(
    rank: int, function: Callable[..., object], size: int, folder: str, arguments: tuple[Any, ...]
) -> None:
    """Call `function(rank, *arguments)` in this process, of a group of `size` processes."""
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # independent of the host name
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)
    function(rank, *arguments)
    end()


def end() -> None:
    """Destroy the process group and end this process, with exit code 0.

    Python's own end would abort it if a thread of gloo still had tensors to free.
    """
    gc.collect()  # DistributedDataParallel may be in a reference cycle, and aborts or hangs if it outlives the group
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def groups_in_turn(rank: int, sizes: tuple[int, ...], folder: Path) -> Iterator[tuple[int, int]]:
    """Yield the turns and the sizes of process groups of the first processes, in those that belong to them.

    New groups of the same processes take less time than new processes. The last group has all of them.
    """
    for turn, size in enumerate(sizes):
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()
        if rank < size:
            rendezvous = f"file://{folder}/group-{turn}"
            dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
            yield turn, size
