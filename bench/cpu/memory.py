"""Peak memory of one call in a new process: `python -m bench.cpu.memory ours step 256x8142x2048` prints bytes.

The arguments are a name, a pass and a size. The passes are "forward" and "step" (bench/cpu/logits.py), "loss" and "topk"
(bench/cpu/losses.py). The figure excludes what exists before the call: arguments, labels, PyTorch's thread pools,
compiled code and BLAS buffers. A first call allocates these, and freed memory is returned to the system before the second
call is measured.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

from ..problem import Size, make_tensors
from . import losses
from .logits import PASSES, implementation


def read_status(field: str) -> int:
    """Return a field of this process's status, such as VmRSS, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: expected a line {field}, found none")


def reset_peak() -> int:
    """Reset VmHWM and return the resident bytes."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return read_status("VmRSS")


def peak(name: str, kind: str, size: Size) -> int:
    """Return the peak of the resident memory that one call adds, in bytes."""
    arguments = make_tensors(size)
    runs = {"loss": losses.loss_step, "topk": losses.topk}
    run = runs[kind](name, arguments) if kind in runs else PASSES[kind](implementation(name), arguments)
    run()
    for argument in arguments:
        argument.grad = None
    ctypes.CDLL(None).malloc_trim(0)
    before = reset_peak()
    run()
    return read_status("VmHWM") - before


if __name__ == "__main__":
    torch.manual_seed(0)
    print(peak(sys.argv[1], sys.argv[2], Size.parse(sys.argv[3])))
