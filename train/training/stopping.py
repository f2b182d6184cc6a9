"""A run that is asked to end, by SIGTERM, writes a checkpoint after the step that it is at: as queues of clusters ask."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .. import distributed

CODE = 75  # what a run that was stopped exits with: try again, with --resume

_asked = threading.Event()


class Stopped(RuntimeError):
    """The run was asked to end, and its checkpoint is written."""


@contextmanager
def listening() -> Iterator[None]:
    """True once SIGTERM has asked. With several processes it ends them as ever, as each would come to another step."""
    _asked.clear()
    if distributed.is_initialized() or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: _asked.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def asked() -> bool:
    return _asked.is_set()
