"""Saves that are killed: the last complete checkpoint can be loaded, and the next save cleans up."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from gistops.distributed import load_checkpoint, save_checkpoint, shard_classes
from gistops.nn import ConstellationClassifier

from ..processes import in_group

FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.listdir", "os.scandir"}
REMOVALS = {"os.remove", "os.rmdir"}  # shutil.rmtree gives them relative names


def kill_at(operation: int, folder: Path, end: str = "") -> None:
    """Kill this process before its n-th removal or operation in `folder` on a file whose name has this end."""
    left = operation

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        concerned = event in REMOVALS or (event in FILE_OPERATIONS and str(folder) in str(arguments[0]))
        if concerned and str(arguments[0]).endswith(end):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(hook)


def model_of(value: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model and an optimizer whose tensors all have this value."""
    model = nn.Linear(20, 30)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
            optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, value)
    return model, optimizer


def loaded_value(folder: Path) -> int:
    """Return the value of the last checkpoint in `folder`, which all its tensors must have; older ones are readable too."""
    for older in folder.glob("checkpoint-*/.metadata"):
        load_checkpoint(older.parent, *model_of(-1))
    model, optimizer = model_of(-1)
    value = load_checkpoint(folder, model, optimizer)["value"]
    for parameter in model.parameters():
        for tensor in (parameter, optimizer.state[parameter]["momentum_buffer"]):
            assert torch.equal(tensor, torch.full_like(tensor, value)), value
    return int(value)


def in_fork(action: Callable[[], object]) -> int:
    """Start a process for the action and return its id."""
    process = os.fork()
    if process == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return process


def save(folder: Path, value: int) -> None:
    save_checkpoint(folder, *model_of(value), extra={"value": value})


def kill_everywhere(_: int, folder: Path, seed: int) -> None:
    """Kill saves before each of their operations on files, then at random times, and load after each kill."""
    torch.set_num_threads(1)
    chance = random.Random(seed)
    save(folder, 0)
    seconds = -time.monotonic()
    save(folder, 1)
    seconds += time.monotonic()
    last, value, killed, operation = 1, 1, 0, 0
    while operation >= 0 or killed < 20:
        value += 1
        if operation >= 0:

            def killed_save(value: int = value, operation: int = operation) -> None:
                kill_at(operation, folder)
                save(folder, value)

            _, status = os.waitpid(in_fork(killed_save), 0)
            operation = operation + 1 if os.WIFSIGNALED(status) else -1
            assert operation < 200
        else:
            process = in_fork(lambda value=value: save(folder, value))  # type: ignore[misc]
            time.sleep(chance.uniform(0, 1.5 * seconds))
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            killed += 1
        if os.WIFSIGNALED(status):
            found = loaded_value(folder)
            assert found in (last, value), f"expected {last} or {value}, got {found}"
            last = found
        else:
            assert os.WEXITSTATUS(status) == 0
            last = loaded_value(folder)
            assert last == value
            assert len(list(folder.iterdir())) == 1
    save(folder, value + 1)
    assert loaded_value(folder) == value + 1
    assert len(list(folder.iterdir())) == 1


@pytest.mark.cpu
def test_a_kill_at_any_moment_leaves_a_complete_checkpoint(tmp_path: Path, seed: int) -> None:
    mp.spawn(kill_everywhere, (tmp_path / "run", seed))


def kill_rank_1(rank: int, folder: Path) -> None:
    head = shard_classes(ConstellationClassifier(4, 5, 1))
    nn.init.constant_(head.raw_tau, 3.0)
    save_checkpoint(folder, head)
    nn.init.constant_(head.raw_tau, 4.0)
    if rank == 1:
        kill_at(0, folder / "checkpoint-2", ".distcp")
    with pytest.raises(RuntimeError, match="by peer"):  # as rank 0 has it, unless it is ended before
        save_checkpoint(folder, head)
    os._exit(0)  # destroy_process_group would wait for the dead


@pytest.mark.cpu
def test_a_killed_rank_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        in_group(kill_rank_1, 2, tmp_path, tmp_path / "run")
    assert not dist.is_initialized()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-1", "checkpoint-2"]
    head = ConstellationClassifier(4, 5, 1)
    load_checkpoint(tmp_path / "run", head)
    assert head.raw_tau == 3.0
    save_checkpoint(tmp_path / "run", head)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-3"]
