"""The collectives of a step: their time apart from the waiting for other processes, and the bytes that left this process."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

BYTES_SENT = 200  # offset of tcpi_bytes_sent in Linux's struct tcp_info, 64 bits


class Call(NamedTuple):
    """A call of a collective."""

    kind: str
    bytes: int  # of the tensor of all processes: gathered, scattered or reduced
    waiting: float  # seconds until all processes had come
    transfer: float  # seconds from then on


class Recorder:
    """Context that records the collectives that `torch.distributed` is asked for.

    All processes wait for each other before each collective. The times of a step are therefore those of a step that waits
    more often; `bench.sharded` reports the time of whole steps without a recorder.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._originals: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> Recorder:
        # The tensor of all processes is the first argument of a gather and of an all-reduce, the second of a scatter.
        new = hasattr(dist, "all_gather_single")  # torch 2.11 has the old names alone
        self._replace("all_gather_single" if new else "all_gather_into_tensor", "all_gather", 0)
        self._replace("reduce_scatter_single" if new else "reduce_scatter_tensor", "reduce_scatter", 1)
        self._replace("all_reduce", "all_reduce", 0)
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _replace(self, name: str, kind: str, position: int) -> None:
        original = self._originals[name] = getattr(dist, name)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            tensor: Tensor = args[position]
            begin = time.perf_counter()
            dist.barrier(kwargs.get("group"))
            arrived = time.perf_counter()
            result = original(*args, **kwargs)
            size = tensor.numel() * tensor.element_size()
            self.calls.append(Call(kind, size, arrived - begin, time.perf_counter() - arrived))
            return result

        setattr(dist, name, recorded)


def bytes_sent() -> int:
    """Return the bytes that this process has sent over its TCP connections, gloo's among them."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_SENT + 8)
        except OSError:  # closed meanwhile, or no TCP connection
            continue
        if len(info) == BYTES_SENT + 8:
            total += struct.unpack_from("=Q", info, BYTES_SENT)[0]
    return total
