"""Checkpoints that do not depend on the number of ranks, written by `torch.distributed.checkpoint`."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from .checkpoint_folders import METADATA, begin, finish, last_complete
from .checkpoint_model import load_model, model_values, values_to_load
from .checkpoint_names import EXTRA, Saved
from .checkpoint_optimizer import load_optimizers, named_optimizers, optimizer_values, state_to_load
from .ranks import on_all_ranks, on_rank_0

#: The state dicts are flat already. Flattening would change the keys of `extra`, and drop what is empty.
FLAT = {"flatten_state_dict": False, "flatten_sharded_tensors": False}


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    *,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Save a model and its optimizers for any number of ranks. All ranks must call this function.

    Each rank writes its own shards, by `torch.distributed.checkpoint`, into a new folder `folder/checkpoint-N`, where N counts
    up. Values that all ranks have, such as the parameters of a backbone under DistributedDataParallel, come from rank 0. The
    checkpoint is complete when its file `.metadata` exists, which appears after all ranks have written. Only then are
    older checkpoints in `folder` removed. A run that is killed at any moment leaves a complete checkpoint, if there was one
    before. The next save removes incomplete ones. To keep a checkpoint, rename its folder.

    Args:
        folder: the folder of one run's checkpoints, on a file system that all ranks share; created if it does not exist.
        model: a module; its parameters may be DTensors, as `shard_classes` and `fully_shard` make them, and it or its
            submodules may be wrapped in DistributedDataParallel.
        optimizer: the optimizer or optimizers of the model's parameters.
        extra: other values that the rest of a run depends on, such as the epoch; those of rank 0 are saved. Values that
            `torch.save` can write, without DTensors.

    Returns:
        the folder of the new checkpoint.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        NotADirectoryError: `folder` is a file.
        RuntimeError: a rank could not write. Its exception is the cause.
        OSError: a folder could not be created or removed.
    """
    folder = Path(folder)

    def values() -> dict[str, Any]:
        if extra is not None and not isinstance(extra, dict):
            raise TypeError(f"extra: expected a dict or None, got {type(extra).__name__}")
        of_model = {name: value for name, (_, value) in model_values(_checked(model)).items()}
        named = named_optimizers(model, _optimizers(optimizer))
        return {**of_model, **optimizer_values(named), EXTRA: extra or {}}

    state = on_all_ranks(values)
    path = on_rank_0(lambda: begin(folder))
    on_all_ranks(lambda: _check_shared(path))
    planner = DefaultSavePlanner(**FLAT, dedup_save_to_lowest_rank=True)
    with _errors("save", path):
        save(state, storage_writer=FileSystemWriter(path, overwrite=False), planner=planner)
    on_rank_0(lambda: finish(path))
    return path


def load_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    *,
    strict: bool = True,
) -> dict[str, Any]:
    """Load a checkpoint into a model and its optimizers, with any number of ranks. All ranks must call this function.

    It takes the complete checkpoint of the highest number in `folder`. The ranks may be more or fewer than those
    that saved it. A parameter may be sharded, replicated or plain, whatever it was; without a process group this
    process loads everything. Each rank reads the files that hold its rows. Values are converted to the dtypes of
    the model.

    All names and shapes are checked before the first value changes. Tensors are read into the memory of the model: if a
    file cannot be read, the values of the model are undefined. Load only checkpoints that you trust: like `torch.load` with
    `weights_only=False`, this may run code from the file.

    A head whose number of displacements differs from the checkpoint's gets that number, as by `load_state_dict`. Its
    parameters are then new ones, so that this works without `optimizer` alone: create the optimizer afterward.

    Args:
        folder: the folder given to `save_checkpoint`, or the folder of one checkpoint.
        model: a module with the names and shapes of the saved one; it need not be wrapped or sharded alike.
        optimizer: the optimizer or optimizers. Parameters may be grouped otherwise than in the saved run. Options such as
            the learning rate are loaded too, apart from `foreach`, `fused` and `capturable`.
        strict: False loads the names that both sides have, as in `load_state_dict`.

    Returns:
        `extra` of the saved checkpoint.

    Raises:
        FileNotFoundError: there is no complete checkpoint, on all ranks.
        TypeError, ValueError: an argument does not fit the checkpoint; the message says what was expected and what came.
        RuntimeError: a file could not be read. The exception is the cause.
    """
    path = on_rank_0(lambda: last_complete(Path(folder)))

    def prepare() -> Any:
        saved = _metadata(path)
        named = named_optimizers(_checked(model), _optimizers(optimizer))
        try:
            values, changed = values_to_load(model, saved, strict)
        except ValueError as error:
            raise ValueError(f"model: it does not match the checkpoint {path}: {error}") from None
        if not named:
            return values, named, {}
        if changed:
            raise ValueError(
                f"optimizer: expected None, because the checkpoint {path} has another number of displacements for "
                f"{', '.join(changed)}, whose parameters this replaces; load the model, then create the optimizer"
            )
        try:
            return values, named, state_to_load(named, saved, strict)
        except ValueError as error:
            raise ValueError(f"optimizer: it does not match the checkpoint {path}: {error}") from None

    values, named, state = on_all_ranks(prepare)
    read = {**{name: value for name, (_, value) in values.items()}, **state, EXTRA: None}
    planner = DefaultLoadPlanner(**FLAT, allow_partial_load=True)
    with _errors("load", path):
        load(read, storage_reader=FileSystemReader(path), planner=planner)
    load_model(model, {name: value._replace(value=read[name]) for name, value in values.items()}, strict)
    load_optimizers(named, read)
    return read[EXTRA] or {}


def _checked(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def _optimizers(optimizer: object) -> tuple[Optimizer, ...]:
    if optimizer is None:
        return ()
    given = tuple(optimizer) if isinstance(optimizer, Iterable) else (optimizer,)
    for one in given:
        if not isinstance(one, Optimizer):
            raise TypeError(
                f"optimizer: expected a torch.optim.Optimizer or several, got {type(one).__name__}"
            )
    return given


def _check_shared(path: Path) -> None:
    """Check that this rank sees the folder that rank 0 has created."""
    if not path.is_dir():
        raise FileNotFoundError(
            f"folder: expected a file system that all ranks share, but {path}, which rank 0 has created, does not exist on "
            f"{platform.node()}"
        )


def _metadata(path: Path) -> Saved:
    """Return the metadata of the values in a checkpoint.

    Raises:
        RuntimeError: the file is damaged, or is another file.
    """
    try:
        saved: Saved = FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:
        raise RuntimeError(
            f"folder: expected metadata of torch.distributed.checkpoint in {path / METADATA}, got {type(error).__name__}: {error}"
        ) from error
    return saved


@contextmanager
def _errors(action: str, path: Path) -> Iterator[None]:
    """Raise the failure of a rank as a RuntimeError; without a process group, do not warn that there is none."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
        )
        try:
            yield
        except CheckpointException as error:
            rank, (cause, _) = min(error.failures.items())
            raise RuntimeError(
                f"folder: rank {rank} could not {action} {path}: {type(cause).__name__}: {cause}"
            ) from cause
