"""The state of a trainer in checkpoints: everything that the remaining steps depend on."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import distributed
from ..files import write_atomically
from .head_checkpoint import METADATA, head_tensors, load_head, remove_other_folders, without_head, write_head
from .optim import load_optimizer

if TYPE_CHECKING:
    from .trainer import Trainer

POSITION = ("stage", "epoch", "step_of_epoch", "images", "lr")
RENAMED = {"head.transfer_directions": "feature_transfer.directions"}  # tensors of older checkpoints


def save_torch(value: object, path: Path) -> None:
    """Save a value with torch.save. The error of a full disk has an OSError as its cause or context."""
    with open(path, "wb") as file:  # given a path, torch.save raises errors without their reason
        torch.save(value, file)


class DamagedFileError(ValueError):
    """A file that is not whole. The message names the file and the reason."""


def load_torch(path: Path, *names: str) -> dict[str, Any]:
    """Return the dictionary that `save_torch` wrote, on the CPU.

    Args:
        path: the file.
        names: the keys that the dictionary must have.

    Raises:
        DamagedFileError: the file is truncated or damaged, or is another file.
        PermissionError: this user may not read the file.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, pickle.UnpicklingError) as error:
        why = str(error).partition("\n")[0]
        raise DamagedFileError(f"{path}, which is damaged ({type(error).__name__}: {why})") from None
    if not isinstance(saved, dict) or not saved.keys() >= set(names):
        raise DamagedFileError(f"{path}, which is damaged (no {', '.join(names)} in it)")
    return saved


def save_trainer(file: Path, trainer: Trainer, more: dict[str, Any]) -> None:
    """Write a checkpoint with a trainer's state and `more` atomically. All processes call the function; rank 0 writes.

    With --shard-classes each process also writes its part of the head, into a folder beside the file.

    Raises:
        WriteError: the disk is full, or the folder cannot be written to. The previous checkpoint remains.
    """
    training = trainer.state_dict()
    sharded = trainer.config.runtime.shard_classes
    if sharded:
        training["head_folder"] = write_head(file, head_tensors(trainer))
    if distributed.rank() == 0:
        write_atomically(file, lambda path: save_torch(more | {"training": training}, path))
        if sharded:
            remove_other_folders(file, training["head_folder"])


def load_trainer_file(file: Path, *names: str) -> dict[str, Any]:
    """Return what `save_trainer` wrote, for `load_trainer_state`; arguments and errors as for `load_torch`."""
    saved = load_torch(file, "training", *names)
    if name := saved["training"].get("head_folder"):
        folder = file.with_name(name)
        if not (folder / METADATA).exists():
            raise DamagedFileError(f"{file}, whose folder {folder} is missing or damaged")
        saved["training"]["head_folder"] = str(folder)
    return saved


def trainer_state(trainer: Trainer) -> dict[str, Any]:
    """Return the state of a trainer in plain types and tensors. It is the same in all processes.

    With --shard-classes it lacks the tensors of `head_tensors`.
    """
    on_gpu = trainer.device.type == "cuda"
    state = {
        "name": trainer.name,
        "position": {name: getattr(trainer, name) for name in POSITION},
        "sums": {name: distributed.all_reduce_sum(sum_.clone()) for name, sum_ in trainer.loss_sums.items()},
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.scheduler.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "batches": trainer.batches.state_dict(),
        "torch_rng": distributed.all_gather(torch.get_rng_state()),
        "cuda_rng": distributed.all_gather(torch.cuda.get_rng_state(trainer.device)) if on_gpu else [],
    }
    state |= {name: part.state_dict() for name, part in _optional_parts(trainer).items()}
    return without_head(trainer, state) if trainer.config.runtime.shard_classes else state


def _optional_parts(trainer: Trainer) -> dict[str, Any]:
    """Return the parts of a trainer that only some options have."""
    parts = {"average": trainer.average, "best": trainer.best}
    return {name: part for name, part in parts.items() if part is not None}


def load_trainer_state(trainer: Trainer, state: dict[str, Any]) -> None:
    """Restore a state that `trainer_state` returned, into a new trainer, also with another number of processes.

    With the same number of processes, all random numbers continue as if the run had not been interrupted.
    """
    for stage in range(1, state["position"]["stage"] + 1):
        trainer.begin_stage(stage)  # so that the parameters and the optimizer are those of the saved stage
    for name in POSITION:
        setattr(trainer, name, state["position"][name])
    rank = distributed.rank()
    # The saved sums are over all processes: rank 0 continues them, the others start from zero.
    trainer.loss_sums = {name: sum_.to(trainer.device) * (rank == 0) for name, sum_ in state["sums"].items()}
    load_optimizer(trainer.optimizer, state["optimizer"])
    if trainer.config.runtime.shard_classes:
        state = load_head(trainer, state)
    trainer.model.load_state_dict({RENAMED.get(name, name): x for name, x in state["model"].items()})
    for name, part in _optional_parts(trainer).items():
        part.load_state_dict(state[name])
    trainer.scheduler.load_state_dict(state["scheduler"])
    trainer.scaler.load_state_dict(state["scaler"])
    trainer.batches.load_state_dict(state["batches"])
    if rank < len(state["torch_rng"]):
        torch.set_rng_state(state["torch_rng"][rank])
    if rank < len(state["cuda_rng"]):
        torch.cuda.set_rng_state(state["cuda_rng"][rank], trainer.device)
