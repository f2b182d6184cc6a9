"""The division of classes between processes, and the agreement of the processes on each call."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..._dtensor import FSDP, is_dtensor, local

#: Group of a mesh on GPUs -> a group of the same processes for tensors of the host.
_host_groups: dict[Any, dist.ProcessGroup] = {}


def all_gather_single(out: Tensor, x: Tensor, group: dist.ProcessGroup) -> None:
    """Gather x of all processes into out; torch 2.11 has this collective under its old name alone."""
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    gather(out, x, group=group)


def reduce_scatter_single(out: Tensor, x: Tensor, group: dist.ProcessGroup) -> None:
    """Write the sum over the processes of this process's part of x to out; the same about its name."""
    scatter = (
        dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
    )
    scatter(out, x, group=group)


class Shards(NamedTuple):
    """The classes of this process: `start` to `stop` of K. Rank r has the r-th of the chunks that `torch.chunk` makes."""

    mesh: Any
    group: dist.ProcessGroup
    host_group: dist.ProcessGroup
    rank: int
    size: int  # number of processes
    classes: int  # K
    start: int
    stop: int

    @classmethod
    def of(cls, centers: DTensor) -> Shards:
        """Return the division of the classes of centers.

        Raises:
            TypeError: the placement of centers is not Shard(0) on a mesh of one dimension.
        """
        mesh, placements = centers.device_mesh, tuple(centers.placements)
        if mesh.ndim != 1 or placements != (Shard(0),):
            raise TypeError(
                f"centers: expected a DTensor with placement Shard(0) on a mesh of one dimension, got {placements} on a "
                f"mesh of shape {tuple(mesh.shape)}; shard_classes(head, mesh) places the parameters of a head. "
                + FSDP
            )
        return cls.on(mesh, centers.shape[0])

    @classmethod
    def on(cls, mesh: Any, classes: int) -> Shards:
        """Return the division of a number of classes between the processes of a mesh of one dimension."""
        rank, size = mesh.get_local_rank(), mesh.size()
        chunk = -(-classes // size)
        start, stop = min(rank * chunk, classes), min((rank + 1) * chunk, classes)
        group = mesh.get_group()
        return cls(mesh, group, _host_group(group), rank, size, classes, start, stop)

    def agree(self, facts: Mapping[str, object], rows: int, needs: int, error: Exception | None) -> Batch:
        """Exchange the sizes of a call, so that a mistake in one process is an error in all of them, not a deadlock.

        Args:
            facts: what must be equal in all processes, by name; empty after an error.
            rows: the number of rows of this process.
            needs: a bit for each gradient that this process needs.
            error: the error of this process's checks.

        Raises:
            Exception: `error`; a RuntimeError in the other processes.
            ValueError: facts differ; the message names them.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return Batch([rows], needs)
        digest = zlib.crc32(repr(facts).encode())
        mine = torch.tensor([error is not None, rows, needs, digest], device="cpu")
        gathered = torch.empty(self.size * len(mine), dtype=torch.int64, device="cpu")
        with self.collective():
            all_gather_single(gathered, mine, group=self.host_group)
        failed, sizes, needed, digests = gathered.view(self.size, -1).T.tolist()
        if any(failed):
            self._raise_error(error)
        if len(set(digests)) > 1:
            self._raise_difference(facts)
        joint = 0
        for bits in needed:
            joint |= bits
        return Batch(sizes, joint)

    def _raise_error(self, error: Exception | None) -> None:
        messages = self._gather_object(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        rank, message = next((rank, text) for rank, text in enumerate(messages) if text is not None)
        raise RuntimeError(f"rank {rank} of the sharded classifier raised {message}")

    def _raise_difference(self, facts: Mapping[str, object]) -> None:
        others = self._gather_object({name: str(value) for name, value in facts.items()})
        first = others[0]
        for rank, other in enumerate(others):
            for name in (*first, *(name for name in other if name not in first)):
                expected, got = first.get(name), other.get(name)
                if got != expected:
                    raise ValueError(
                        f"{name}: expected the same on all ranks of the sharded classifier, got {expected} on rank 0 and "
                        f"{got} on rank {rank}"
                    )

    def _gather_object(self, value: object) -> list[Any]:
        values = [None] * self.size
        with self.collective():
            dist.all_gather_object(values, value, group=self.host_group)
        return values

    @contextlib.contextmanager
    def collective(self) -> Iterator[None]:
        """Return a context for a collective: its errors say that another process has probably ended.

        Raises:
            RuntimeError: the collective failed.
        """
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"a collective of the sharded classifier failed on rank {self.rank} of {self.size}: another rank has "
                f"probably ended, or did not make the same call within the timeout of its process group ({error})"
            ) from error

    def local_part(self, name: str, value: Any) -> Any:
        """Return this process's part of a vector [K], which is a DTensor like the centers, or whole in each process.

        Raises:
            TypeError, ValueError: the placement, the mesh or the shape does not fit; a whole vector needs a gradient.
        """
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if tuple(value.shape) != (self.classes,):
            raise ValueError(
                f"{name}: expected shape [{self.classes}], one element per class, got {list(value.shape)}"
            )
        if is_dtensor(value):
            return self.sharded(name, value)
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: expected a DTensor like the centers where it needs a gradient, got a whole tensor; "
                "distribute_tensor(value, mesh, [Shard(0)]) makes one"
            )
        return value[self.start : self.stop]

    def sharded(self, name: str, value: Any) -> Tensor:
        """Return the local tensor of a DTensor with placement Shard(0), differentiable.

        Raises:
            TypeError, ValueError: the placement or the mesh does not fit.
        """
        self._check(name, value, Shard(0))
        return local(value)

    def replicated(self, name: str, value: Any) -> Any:
        """Return the local tensor of a DTensor with placement Replicate, differentiable; and any other value itself.

        Raises:
            TypeError, ValueError: the placement or the mesh does not fit.
        """
        if not is_dtensor(value):
            return value
        self._check(name, value, Replicate())
        return local(value)

    def _check(self, name: str, value: Any, placement: Shard | Replicate) -> None:
        if not is_dtensor(value):
            raise TypeError(
                f"{name}: expected a DTensor, like those of the other head, got {type(value).__name__}"
            )
        if value.device_mesh != self.mesh:
            raise ValueError(
                f"{name}: expected the mesh of the centers, {self.mesh}, got {value.device_mesh}"
            )
        if tuple(value.placements) != (placement,):
            raise TypeError(
                f"{name}: expected a DTensor with placement {placement!r}, got {value.placements}. {FSDP}"
            )


class Batch(NamedTuple):
    """The joint batch of a call."""

    sizes: list[int]  # rows of each process
    needs: int  # a bit for each gradient that some process needs


def _host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return a group of the same processes for tensors of the host; a collective on a group's first call."""
    if torch.device("cpu") in group._device_types:
        return group
    if group not in _host_groups:
        ranks = dist.get_process_group_ranks(group)
        _host_groups[group] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return _host_groups[group]
