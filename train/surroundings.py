"""The settings of PyTorch that a program may have changed before it calls the driver."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_lock = threading.Lock()
_in_use = 0  # calls of usual_settings, in all threads
_dtype = torch.float32  # the program's default dtype while there are any


@contextmanager
def usual_settings() -> Iterator[None]:
    """Run with the settings of a new process: gradients, float32, the CPU, no autocast. Those of the program return afterward."""
    with ExitStack() as stack:
        stack.enter_context(_float32())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def _float32() -> Iterator[None]:
    """Make float32 the default dtype, which all threads share, so that the last of them restores that of the program."""
    global _in_use, _dtype
    with _lock:
        if not _in_use:
            _dtype = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
        _in_use += 1
    try:
        yield
    finally:
        with _lock:
            _in_use -= 1
            if not _in_use:
                torch.set_default_dtype(_dtype)
