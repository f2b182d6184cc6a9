"""Processes that decode or draw images."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from .errors import DataError


@contextmanager
def process_map(workers: int | None, *, serial: bool) -> Iterator[Callable[..., Iterator[Any]]]:
    """Yield a `map` over `workers` processes, by default one per processor; the built-in `map` if `serial`.

    A daemonic process, such as a worker of a pool, may not start processes, and gets the built-in `map` too.

    Raises:
        DataError: the system ended a process.
    """
    if serial or multiprocessing.current_process().daemon:
        yield map
        return
    try:
        with ProcessPoolExecutor(workers or num_cores(), Context()) as pool:

            def each(*arguments: Any) -> Iterator[Any]:
                with _without_sigint():  # the processes start here
                    return pool.map(*arguments)

            try:
                yield each
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    except BrokenProcessPool:
        raise DataError(
            "expected worker processes that finish their images, got one that the system ended, as when memory runs out"
        ) from None


def num_cores() -> int:
    """Return the number of processors that this process may use: a scheduler such as Slurm may give it a few of the machine's."""
    # macOS has no affinity.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _without_sigint() -> Iterator[None]:
    """Block SIGINT in processes that are started here, and defer it in this one, so that it knows all that it has to end.

    Ctrl-C goes to this process alone, which ends the others.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # inherited
    deferred: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    if is_main:  # another thread may get the signal, and the main one then handles it
        handler = signal.signal(signal.SIGINT, lambda number, _: deferred.append(number))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if is_main:
            signal.signal(signal.SIGINT, handler)
        if deferred:
            signal.raise_signal(signal.SIGINT)


class Process(SpawnProcess):
    """A process that does not import the program's main module.

    It needs the functions of this package alone. A user's script that calls `train.fit` at its top level would otherwise call it
    again in each process, and wait there for the first call.
    """

    def start(self) -> None:
        main = sys.modules["__main__"]
        hidden: dict[str, Any] = {
            name: vars(main)[name] for name in ("__spec__", "__file__") if name in vars(main)
        }
        try:
            main.__spec__ = None
            vars(main).pop("__file__", None)
            super().start()
        finally:
            vars(main).update(hidden)


class Context(SpawnContext):
    """Starts such processes. Not by fork: a fork of a process with threads, such as torch's, may deadlock."""

    Process = Process
