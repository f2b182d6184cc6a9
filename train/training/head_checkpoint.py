"""Checkpoints of a head with --shard-classes: a folder beside the checkpoint, to which each process writes its own classes.

PyTorch's `torch.distributed.checkpoint` writes it, so that any number of processes can read it. The checkpoint names its folder and
is written last, and older folders are removed afterward: a run that is killed at any moment leaves a checkpoint with its folder.
"""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import distributed
from ..config import ConfigError
from ..files import WriteError, sync_folder

if TYPE_CHECKING:
    from torch.distributed.checkpoint.api import CheckpointException

    from .trainer import Trainer

HEAD = "head."
COPIES = ("", "average", "best")  # of the head: in the names of its tensors, before a space
METADATA = ".metadata"  # a folder is complete if it has this file


def head_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Return the tensors of the head, of its copies and of its optimizer state, by name; they share the trainer's memory."""
    tensors = _of_head("", trainer.model.state_dict())
    if trainer.average is not None:
        tensors |= _of_head("average ", trainer.average.module.state_dict())
    if trainer.best is not None:
        tensors |= _of_head("best ", trainer.best.model)
    for name, parameter in trainer.model.named_parameters():
        if name.startswith(HEAD):
            for key, value in trainer.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{key} {name}"] = value
    return tensors


def _of_head(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: x for name, x in state.items() if name.startswith(HEAD)}


def _without_head(state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    return {name: x for name, x in state.items() if not name.startswith(prefix + HEAD)}


def without_head(trainer: Trainer, state: dict[str, Any]) -> dict[str, Any]:
    """Return a trainer's state without the tensors of `head_tensors`, but with their names."""
    head = {id(p) for name, p in trainer.model.named_parameters() if name.startswith(HEAD)}
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    others = {i: values for i, values in state["optimizer"]["state"].items() if id(parameters[i]) not in head}
    state = state | {
        "model": _without_head(state["model"]),
        "optimizer": state["optimizer"] | {"state": others},
        "head": sorted(head_tensors(trainer)),
    }
    if "average" in state:
        state["average"] = _without_head(state["average"], "module.")
    if "best" in state:
        state["best"] = state["best"] | {"model": _without_head(state["best"]["model"])}
    return state


def load_head(trainer: Trainer, state: dict[str, Any]) -> dict[str, Any]:
    """Read the tensors of `head_tensors` for a trainer whose head has the saved shapes; put those of the optimizer into it.

    Returns:
        The state that `without_head` was given, but for the optimizer's.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    head = _of_head("", trainer.model.state_dict())
    parameters = dict(trainer.model.named_parameters())
    groups = trainer.optimizer.param_groups
    # The parameters whose steps are counted on their device.
    on_device = {id(p) for g in groups if g["fused"] or g.get("capturable") for p in g["params"]}
    tensors = {}
    for saved in state["head"]:
        key, _, name = saved.rpartition(" ")
        if key == "step":  # AdamW's, a number
            device = trainer.device if id(parameters[name]) in on_device else None
            tensors[saved] = torch.zeros((), device=device)
        else:
            tensors[saved] = torch.zeros_like(head[name])
        if key not in COPIES:
            trainer.optimizer.state[parameters[name]][key] = tensors[saved]
    _read(Path(state["head_folder"]), tensors)
    of_copy: dict[str, dict[str, Tensor]] = {key: {} for key in COPIES}
    for saved, tensor in tensors.items():
        key, _, name = saved.rpartition(" ")
        if key in COPIES:
            of_copy[key][name] = tensor
    state = state | {"model": state["model"] | of_copy[""]}
    if "average" in state:
        of_module = {f"module.{name}": x for name, x in of_copy["average"].items()}
        state["average"] = state["average"] | of_module
    if "best" in state:
        state["best"] = state["best"] | {"model": state["best"]["model"] | of_copy["best"]}
    return state


def write_head(file: Path, tensors: dict[str, Tensor]) -> str:
    """Write tensors into a new folder for the checkpoint `file`; return its name. All processes call the function.

    Raises:
        WriteError: the disk is full, or the folder cannot be written to.
    """
    # Imported here because it takes a second, also for --help.
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    folder = distributed.broadcast_from_rank0(lambda: _next_folder(file))
    try:
        with _quiet():
            save(tensors, checkpoint_id=folder, no_dist=not distributed.is_initialized())
    except CheckpointException as error:
        raise WriteError(f"{folder}: {_reason(error)}") from error
    if distributed.rank() == 0:
        sync_folder(folder)
    return folder.name


def remove_other_folders(file: Path, kept: str) -> None:
    """Remove the folders of the checkpoint `file` but the one that it names."""
    for folder in _folders(file).values():
        if folder.name != kept:
            (folder / METADATA).unlink(missing_ok=True)  # first, so that the rest does not look complete
            shutil.rmtree(folder)


def _folders(file: Path) -> dict[int, Path]:
    """Return the folders of a checkpoint by their numbers."""
    numbers = ((path, path.name.removeprefix(f"{file.stem}-head-")) for path in file.parent.iterdir())
    return {int(number): path for path, number in numbers if number.isdecimal() and path.is_dir()}


def _next_folder(file: Path) -> Path:
    return file.with_name(f"{file.stem}-head-{max(_folders(file), default=0) + 1}")


def _read(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read tensors that any number of processes has written, in-place; each process reads its own parts."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        with _quiet():
            load(tensors, checkpoint_id=folder, no_dist=not distributed.is_initialized())
    except CheckpointException as error:
        got = f"{folder}, which is damaged ({_reason(error)})"
        raise ConfigError("resume", "a whole checkpoint", got) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the warning that a single process saves or loads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _reason(error: CheckpointException) -> str:
    """Return the reason of the first process that failed, in one line."""
    first = error.failures[min(error.failures)][0]
    strerror = first.strerror if isinstance(first, OSError) else None
    return strerror or str(first).partition("\n")[0]
