"""Processes that die or hang in mid-step: the others raise an error that says so, and the run continues from its checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.testing import assert_close

from gistops.distributed import load_checkpoint, shard_classes

from ..processes import begin
from .faulty_run import CASE, SEED
from .test_sharded import D, make_head
from .training import make, train

SIZE = 4  # two groups with one fault each
SECONDS = 600  # of a run, at most
LOST = r"a collective of the sharded classifier failed on rank 0 of 2: another rank has probably ended"


def faults(rank: int, folder: Path) -> None:
    """Ranks 1 and 3 hang, then they die in different moments of a step; ranks 0 and 2 go on."""
    pairs = init_device_mesh("cpu", (SIZE // 2, 2), mesh_dim_names=("pair", "rank"))
    group = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][rank // 2]
    faulty, between = (
        rank % 2 == 1,
        rank < 2,
    )  # the fault is between forward and backward, or before the forward
    steps = [step_of(mesh) for mesh in (DeviceMesh.from_group(group, "cpu"), pairs["rank"])]
    for loss in steps:
        loss().backward()

    def fault(loss: Callable[[], torch.Tensor], happen: Callable[[], None]) -> None:
        if faulty:
            if between:
                loss()
            happen()
            return
        outcome = loss() if between else None
        if happen is hang:  # not before, where a slow machine would exceed it
            _set_pg_timeout(timedelta(seconds=1), group)
        with pytest.raises(RuntimeError, match=LOST):
            (loss() if outcome is None else outcome).backward()

    def hang() -> None:
        while not (folder / f"waited-{rank - 1}").exists():
            time.sleep(0.05)

    fault(steps[0], hang)
    (folder / f"waited-{rank}").touch()
    fault(steps[1], lambda: os.kill(os.getpid(), signal.SIGKILL))
    (folder / f"survived-{rank}").touch()
    os._exit(0)  # destroy_process_group would wait for the dead


def step_of(mesh: DeviceMesh) -> Callable[[], torch.Tensor]:
    """Return a function that computes the loss of this process's rows."""
    head = shard_classes(make_head("translation", 13), mesh)
    x, y = torch.randn(5, D, dtype=torch.float64, requires_grad=True), torch.arange(5)
    return lambda: head.loss(x, y)


def test_processes_that_hang_and_die(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    processes = [
        context.Process(target=begin, args=(rank, faults, SIZE, str(tmp_path), (tmp_path,)))
        for rank in range(SIZE)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, -signal.SIGKILL, 0, -signal.SIGKILL]
    assert sorted(path.name for path in tmp_path.glob("survived-*")) == ["survived-0", "survived-2"]


def launched(processes: int, folder: Path, steps: int, deadly: int) -> subprocess.CompletedProcess[str]:
    launcher = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node"]
    command = [sys.executable, "-m", *launcher, str(processes), "-m", "tests.distributed.faulty_run"]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(folder), str(steps), str(deadly)],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip


def test_torchrun_ends_and_the_run_continues(tmp_path: Path) -> None:
    """A run with 2 processes dies in its 4th step; 3 processes finish it as if it had not."""
    folder, steps, deadly = tmp_path / "run", 6, 3
    died = launched(2, folder, steps, deadly)
    assert died.returncode != 0
    assert "SIGKILL" in died.stderr
    continued = launched(3, folder, steps, -1)
    assert continued.returncode == 0, continued.stderr[-3000:]
    model, optimizers = make(CASE, SEED)
    assert load_checkpoint(folder, model, optimizers) == {"step": steps}
    expected, others = make(CASE, SEED)
    train(CASE, SEED, expected, others, 0, steps)
    assert_close(model.state_dict(), expected.state_dict(), rtol=1e-10, atol=1e-12)
