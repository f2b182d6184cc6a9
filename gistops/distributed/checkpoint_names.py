"""The names of values in a checkpoint, which depend neither on wrappers nor on ranks, and memory to load them into.

They are the names of `torch.distributed.checkpoint.state_dict.get_state_dict` with `flatten_optimizer_state_dict=True`, if
its two results are saved as "model" and "optimizer".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed.tensor as dtensor
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import STORAGE_TYPES, TensorStorageMetadata
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

MODEL = "model."
OPTIMIZER_STATE = "optimizer.state."
OPTIMIZER_OPTIONS = "optimizer.param_groups."
EXTRA = "extra"

#: The metadata of saved values by name: sizes and dtypes of tensors.
Saved = Mapping[str, STORAGE_TYPES]


def plain_name(model: nn.Module, name: str) -> str:
    """Return the name of a value of `model` without the prefixes of DistributedDataParallel and torch.compile."""
    module: Any = model
    kept = []
    for part in name.split("."):
        if part != "_orig_mod" and (part != "module" or not isinstance(module, DistributedDataParallel)):
            kept.append(part)
        module = getattr(module, part, None)
    return ".".join(kept)


def saved_size(saved: Saved, name: str) -> torch.Size | None:
    """Return the size of a saved tensor; None if there is no tensor of this name."""
    value = saved.get(name)
    return value.size if isinstance(value, TensorStorageMetadata) else None


def memory_for(saved: STORAGE_TYPES, like: Tensor) -> Tensor | None:
    """Return an uninitialized tensor of a saved size and dtype, placed like another one; None for other values.

    Dimensions that are as long as those of `like` are sharded like them. Scalars are plain tensors on the CPU.
    """
    if not isinstance(saved, TensorStorageMetadata):
        return None
    size, dtype = saved.size, saved.properties.dtype
    if not size:
        return torch.empty(size, dtype=dtype, device="cpu")
    if not isinstance(like, DTensor):
        return torch.empty(size, dtype=dtype, device=like.device)
    placements = [
        place
        if isinstance(place, Shard) and size[place.dim : place.dim + 1] == like.shape[place.dim :][:1]
        else Replicate()
        for place in like.placements
    ]
    return dtensor.empty(size, dtype=dtype, device_mesh=like.device_mesh, placements=placements)


def some(problems: list[str]) -> str:
    """Return the first few of many problems as text."""
    return "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
