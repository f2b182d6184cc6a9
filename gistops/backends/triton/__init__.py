"""The Triton backend: imported, and its operators defined, when it is first asked for."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


def why_not(device_type: str) -> str | None:
    """Why this backend cannot serve tensors of a device type, and how to get it; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; `pip install triton` brings it (Linux)"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type == "cpu" and not interpreted:
        return "Triton compiles for GPUs; TRITON_INTERPRET=1 runs its kernels on the CPU, slowly, for tests"
    if device_type == "cuda" and not torch.cuda.is_available() and not interpreted:
        return "torch finds no GPU"
    return _define()


@functools.cache
def _define() -> str | None:
    """Import the kernels and define the family `triton`, once; why not, if that fails."""
    try:
        from . import loss, operators
    except ImportError as error:
        return f"Triton does not load: {error}"
    from ... import operators as dispatcher

    dispatcher.define("triton", operators.forward, operators.backward, ("CUDA", "CPU"))
    dispatcher.cross_entropy.define("triton", loss.forward, loss.backward, ("CUDA", "CPU"))
    return None
