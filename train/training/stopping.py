"""Stopping on SIGTERM, which cluster schedulers send, and on SIGINT (Ctrl-C).

In training, the first signal makes the run write a checkpoint after its current step and end; the second ends it at once.
Outside training there is nothing to save, and the first signal ends the run at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .. import distributed

EXIT_CODE = 128 + signal.SIGTERM  # of a run that SIGTERM stopped and that can be resumed
SIGNALS = (signal.SIGTERM, signal.SIGINT)
#: torchrun passes a signal on that its processes may have received already, so that one signal arrives twice.
SAME_SIGNAL_SECONDS = 2.0


class Stopped(KeyboardInterrupt):
    """A signal has stopped the run."""

    def __init__(self, number: int, where: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{where}")
        self.exit_code = 128 + number


class _State:
    """The signal that has arrived, and whether training has to save a checkpoint first."""

    def __init__(self) -> None:
        self.number, self.arrived, self.in_training = 0, 0.0, False


_state = _State()


@contextmanager
def handle_signals() -> Iterator[None]:
    """Handle SIGTERM and SIGINT as this module says while the context is active."""
    _state.number = 0
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, _handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _handle(number: int, frame: FrameType | None) -> None:
    several = distributed.is_initialized()
    if _state.number:  # with several processes only, see below
        if time.monotonic() - _state.arrived > SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        return
    if not _state.in_training:
        raise Stopped(number)
    _state.number, _state.arrived = number, time.monotonic()
    if distributed.rank() == 0:  # print() is not allowed here: the signal may have interrupted it
        os.write(2, b"stopping after this step; a second signal ends the run without a checkpoint\n")
    if not several:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)


@contextmanager
def training() -> Iterator[None]:
    """Let signals wait for `stop_requested` while the context is active."""
    _state.in_training = True
    try:
        yield
    finally:
        _state.in_training = False


def stop_requested() -> int:
    """Return the signal that has arrived in any process, or 0; called in all processes at the same step."""
    return distributed.largest(_state.number)


def raise_if_stopped() -> None:
    """End the run if a signal has arrived since its last step.

    Raises:
        Stopped: a signal has arrived.
    """
    if number := stop_requested():
        raise Stopped(number)
