"""Peak memory of one call in a new process: `python -m bench.cpu.memory ours step 256x8142x2048` prints bytes.

The arguments are a name, a pass and a size. The passes are "forward" and "step" (bench/cpu/logits.py), "loss" and "topk"
(bench/cpu/losses.py). The figure excludes what exists before the call: arguments, labels, PyTorch's thread pools,
compiled code and BLAS buffers. A first call allocates these, and freed memory is returned to the system before the second
call is measured.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import sys
from multiprocessing.connection import Connection
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
    torch.manual_seed(0)
    arguments = make_tensors(size)
    if kind == "loss":
        run = losses.loss_step(losses.LOSSES[name], arguments)
    elif kind == "topk":
        run = losses.topk(name, arguments)
    else:
        run = PASSES[kind](implementation(name), arguments)
    run()
    for argument in arguments:
        argument.grad = None
    ctypes.CDLL(None).malloc_trim(0)
    before = reset_peak()
    run()
    return read_status("VmHWM") - before


def peak_in_new_process(name: str, kind: str, size: Size) -> int:
    """Return `peak` in a new process, a fork of one that has imported the modules and computed nothing.

    The imports would take longer than most calls. The compiler's modules are among them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__, "bench.cpu.compiler"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_peak, args=(sender, name, kind, size))
    process.start()
    process.join()
    if process.exitcode:
        command = f"python -m {__name__} '{name}' {kind} {size.text}"
        raise RuntimeError(f"the process ended with code {process.exitcode}; `{command}` shows why")
    added: int = receiver.recv()
    return added


def _send_peak(sender: Connection, name: str, kind: str, size: Size) -> None:
    sender.send(peak(name, kind, size))


if __name__ == "__main__":
    print(peak(sys.argv[1], sys.argv[2], Size.parse(sys.argv[3])))
