"""Actions that succeed on all ranks or fail on all of them, so that no rank waits for another in vain."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def is_distributed() -> bool:
    """Return True if this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def on_all_ranks(action: Callable[[], T]) -> T:
    """Return the result of `action` on this rank. If it fails on some ranks, raise on all of them.

    Raises:
        Exception: the rank's own exception, else that of the lowest rank that failed.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = action()
    except Exception as raised:
        error = raised
    errors = [error]
    if is_distributed():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, _sendable(error))
    for first in (error, *errors):
        if first is not None:
            raise first
    return result  # type: ignore[return-value]


def _sendable(error: Exception | None) -> Exception | None:
    """Return an exception that other ranks can read; of one that pickle cannot write and read, its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def on_rank_0(action: Callable[[], T]) -> T:
    """Return the result of `action` on rank 0. If it fails there, raise its exception on all ranks."""
    if not is_distributed():
        return action()
    result = [on_all_ranks(lambda: action() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(result, src=0)
    return result[0]  # type: ignore[return-value]
