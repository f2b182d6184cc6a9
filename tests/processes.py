"""Functions run in processes of their own that form a process group.

A process group lives and dies with its process, and what hangs is ended and says where it was.
"""

from __future__ import annotations

import faulthandler
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 240


def in_group(function: Callable[..., object], size: int, folder: Path, *arguments: Any) -> None:
    """Call `function(rank, *arguments)` in each of `size` new processes, which gloo joins.

    Args:
        function: a module's own, so that the processes find it.
        size: how many.
        folder: an empty one, where they find each other.
        arguments: what can be pickled.

    Raises:
        Exception: what one of them raised, with its traceback; or that they did not end in time.
    """
    context = mp.start_processes(
        _begin, (function, size, str(folder), arguments), nprocs=size, join=False, start_method="spawn"
    )
    assert context is not None
    while not context.join():  # raises if one of them failed, and ends the others
        pass


def _begin(
    rank: int, function: Callable[..., object], size: int, folder: str, arguments: tuple[Any, ...]
) -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the machine calls itself
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)
    function(rank, *arguments)
    gc.collect()  # what DistributedDataParallel made may lie in a cycle, and aborts or hangs if it outlives the group
    dist.destroy_process_group()
