"""The Triton backend. Its kernels are imported, and its ops defined, on first use."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from ...operators import registry
from ...operators.cross_entropy import CROSS_ENTROPY_BACKWARD, CROSS_ENTROPY_FORWARD
from ...operators.logits import LOGITS_BACKWARD, LOGITS_FORWARD
from ..chunked import ChunkedOps
from ..eager_loss import python_kernels


def why_not(device_type: str) -> str | None:
    """Return why this backend cannot serve tensors of a device type and how to get it, or None if it can."""
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
    """Import the kernels and define the ops in `torch.ops.gistops_triton`, once. Return why not, if that fails."""
    try:
        from . import logits, loss, topk
    except ImportError as error:
        return f"Triton does not load: {error}"
    ops = torch.ops.gistops_triton
    kernels: dict[registry.Op, Callable[[Any], Any]] = {
        LOGITS_FORWARD: logits.forward,
        LOGITS_BACKWARD: logits.backward,
        CROSS_ENTROPY_FORWARD: loss.forward,
        CROSS_ENTROPY_BACKWARD: loss.backward,
        **ChunkedOps(ops, topk.topk, topk.can_fuse).kernels(),
    }
    for op, kernel in kernels.items():
        registry.define(ops, op, kernel, ("CUDA", "CPU"))
    python_kernels[ops.name] = loss.forward, loss.backward
    return None
