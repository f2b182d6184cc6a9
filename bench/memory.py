"""Peak memory of one form, alone in its process: `python -m bench.memory ours step 256x8142x2048` prints bytes.

Instead of a step of logits (bench/forms.py) also "loss" and "topk" (bench/losses.py).

Beyond what is there before the call: arguments, labels, and PyTorch with its thread pools, compiled code and BLAS
buffers, which an earlier call has made. What that call freed is given back to the system first.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

from . import losses
from .forms import PASSES, Size, form, tensors


def status(field: str) -> int:
    """Bytes of a field of this process's status, such as VmRSS."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: expected a line {field}, found none")


def reset_peak() -> int:
    """Begin to measure VmHWM anew; returns the bytes that are resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak(name: str, kind: str, size: Size) -> int:
    """Bytes of resident memory that one call adds at its peak."""
    arguments = tensors(size)
    runs = {"loss": losses.loss_step, "topk": losses.topk}
    run = runs[kind](name, arguments) if kind in runs else PASSES[kind](form(name), arguments)
    run()
    for argument in arguments:
        argument.grad = None
    ctypes.CDLL(None).malloc_trim(0)
    before = reset_peak()
    run()
    return status("VmHWM") - before


if __name__ == "__main__":
    torch.manual_seed(0)
    print(peak(sys.argv[1], sys.argv[2], Size.parse(sys.argv[3])))
