"""Stopping on SIGTERM, which cluster schedulers send: the run writes a checkpoint after its current step and ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .. import distributed

EXIT_CODE = 75  # of a run that was stopped and can be resumed: EX_TEMPFAIL

_stop_requested = threading.Event()


class Stopped(RuntimeError):
    """The run was asked to stop and has written its checkpoint."""


@contextmanager
def handle_sigterm() -> Iterator[None]:
    """Record SIGTERM for `stop_requested` while the context is active.

    With several processes SIGTERM ends them at once, as without this context: each process would stop at another step.
    """
    _stop_requested.clear()
    if distributed.is_initialized() or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: _stop_requested.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def stop_requested() -> bool:
    """Return whether SIGTERM has arrived."""
    return _stop_requested.is_set()
