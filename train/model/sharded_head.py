"""Values of a head whose classes may be sharded over the processes (`gistops.distributed.shard_classes`).

The functions take plain parameters too. Those that say "all processes" communicate, so all processes call them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gistops import _dtensor
from gistops._dtensor import is_dtensor

from .. import distributed


def is_sharded(head: nn.Module) -> bool:
    """Return whether the classes of a head are sharded."""
    return any(map(is_dtensor, head.parameters()))


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor; it shares the tensor's memory."""
    return _dtensor.local(tensor.detach())


def local_classes(centers: Tensor) -> range:
    """Return the classes whose centers this process has: those of `torch.chunk`."""
    classes = range(len(centers))
    if not is_dtensor(centers):
        return classes
    size = -(-len(centers) // distributed.world_size())
    return classes[distributed.rank() * size :][:size]


def mean_norm(centers: Tensor) -> Tensor:
    """Return the mean norm of the centers, in all processes."""
    norms = local(centers).norm(dim=1)
    return distributed.all_reduce_sum(norms.sum()) / len(centers) if is_dtensor(centers) else norms.mean()


def rows_of(centers: Tensor, classes: list[int]) -> Tensor:
    """Return the centers of some classes, [n, d], in all processes."""
    rows, own = local(centers), local_classes(centers)
    if not is_dtensor(centers):
        return rows[classes]
    found = rows.new_zeros(len(classes), rows.shape[1])
    for i, k in enumerate(classes):
        if k in own:
            found[i] = rows[k - own.start]
    return distributed.all_reduce_sum(found)


def highest(features: Tensor, head: Any, scores: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """Return the class with the highest score of each of this process's rows, [b]; for scores that have no top k of their own.

    Each process computes the scores of all rows for its own classes, a chunk of rows at a time. All processes call the function.

    Args:
        features: the rows of this process, [b, d].
        head: a sharded head.
        scores: (a head of this process's k classes, rows [n, d]) -> scores [n, k].
    """
    parts, own = distributed.all_gather_rows(features), local_classes(head.centers)
    rows = torch.cat(parts)
    values = rows.new_full((len(rows),), -torch.inf, dtype=torch.float64)
    classes = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    if len(own):
        part = _own_head(head)
        for chunk in torch.arange(len(rows), device=rows.device).split(_rows_per_chunk(own)):
            values[chunk], best = scores(part, rows[chunk]).double().max(1)
            classes[chunk] = best + own.start
    first = torch.stack(distributed.all_gather(values)).argmax(0, keepdim=True)
    joint: Tensor = torch.stack(distributed.all_gather(classes)).gather(0, first)[0]
    start = sum(map(len, parts[: distributed.rank()]))
    return joint[start : start + len(features)]


def common_slots(features: Tensor, head: Any) -> Tensor:
    """Return `analysis.common_slot` of the rows of all processes. All processes call the function.

    Each process counts the slots of its own classes, a chunk of rows at a time.
    """
    rows, own = torch.cat(distributed.all_gather_rows(features)), local_classes(head.centers)
    counts = torch.zeros(head.num_displacements + 1, len(rows), dtype=torch.int64, device=rows.device)
    if len(own):
        part = _own_head(head)
        for chunk in torch.arange(len(rows), device=rows.device).split(_rows_per_chunk(own)):
            slots = part(rows[chunk], return_slots=True)[1]
            counts[:, chunk] = torch.stack([(slots == j).sum(1) for j in range(len(counts))])
    most: Tensor = distributed.all_reduce_sum(counts).max(0).values
    return most / int(head.num_classes)


def _own_head(head: nn.Module) -> Any:
    """Return a head of this process's classes. It shares the memory of a sharded head."""
    part = copy.copy(head)
    part._parameters = {
        name: nn.Parameter(local(parameter), requires_grad=False)
        for name, parameter in head.named_parameters()
    }
    return part


def _rows_per_chunk(classes: range) -> int:
    """Return the number of rows whose scores take 256 MiB in float32."""
    return max(1, 2**26 // len(classes))


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a model for its file; that of a sharded head on rank 0 alone, gathered on its CPU.

    One tensor is gathered at a time, so that no GPU needs memory for a whole one. All processes call the function.
    """
    state: dict[str, Any] = model.state_dict()
    return {name: _on_rank0(tensor) if is_dtensor(tensor) else tensor for name, tensor in state.items()}


def _on_rank0(tensor: Tensor) -> Tensor:
    """Return a sharded tensor on the CPU of rank 0, and the own part in other processes."""
    own = local(tensor).cpu()
    if not any(placement.is_shard() for placement in tensor.placements):  # type: ignore[attr-defined]
        return own
    if distributed.rank():
        if len(own):
            dist.send(own.contiguous(), 0)
        return own
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    whole[: len(own)] = own
    size = len(own)  # that of every process but the last ones
    for rank, part in enumerate(whole.split(size)):
        if rank:
            dist.recv(part, rank)
    return whole
