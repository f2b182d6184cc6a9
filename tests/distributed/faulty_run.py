"""A run under torchrun that continues from its last checkpoint, and one of whose processes dies in mid-step if asked to.

Arguments: the folder of checkpoints, the number of steps, and the step in which rank 1 dies (-1: it does not).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from gistops.distributed import load_checkpoint, save_checkpoint

from ..processes import end
from .training import batch, make, train

CASE, SEED = "rotation", 3


def run(folder: Path, steps: int, deadly: int) -> None:
    model, optimizers = make(CASE, SEED)
    first = load_checkpoint(folder, model, optimizers)["step"] if folder.exists() else 0
    for step in range(first, steps):
        if step == deadly and dist.get_rank() == 1:
            model.loss(*batch(CASE, SEED, step))
            os.kill(os.getpid(), signal.SIGKILL)  # the others wait for its backward
        train(CASE, SEED, model, optimizers, step, step + 1)
        save_checkpoint(folder, model, optimizers, extra={"step": step + 1})


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    end()


if __name__ == "__main__":
    main()
