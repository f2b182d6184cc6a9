"""The division of a head's classes between processes."""

from __future__ import annotations

import hashlib
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from .._dtensor import is_dtensor
from .._numbers import check_integer
from ..functional.sharded.shards import Shards
from ..nn.changes import check_plain, check_whole
from ..nn.head import MaxCosineHead

Head = TypeVar("Head", bound=MaxCosineHead)

#: Classes whose initial values one generator draws: the values do not depend on the number of processes.
BLOCK = 65_536


@torch.inference_mode(False)  # the new parameters are trainable
def shard_classes(head: Head, mesh: DeviceMesh | None = None, *, seed: int | None = None) -> Head:
    """Divide the classes of a head between the processes of a mesh, in-place, and return the head.

    The parameters with a row per class become DTensors with placement Shard(0), so that each process has about
    num_classes / W rows of them, and of their gradients and optimizer states. All other parameters become DTensors with
    placement Replicate. The user's code does not change: `loss`, `losses`, `predict`, `predict_topk`, `slot_usage`,
    `add_displacements` and `export` work as before, except that all processes call them together. Logits [..., num_classes]
    are refused, because no process should hold them.

    **Batches.** `input` of a call is a tensor with this process's own rows, which may be none, or a DTensor with placement
    Replicate, the same rows in all processes. Targets are global class numbers. Losses with reduction "mean" and "sum" are those of
    the joint batch, in all processes. Per-sample values are those of the process's own rows.

    **Gradients.** The objective is the mean over the processes of what each one calls `backward` on, as under
    DistributedDataParallel and FSDP, whose averages therefore give the backbone the gradient of the joint loss. The gradients of the
    head's parameters need no further collective: leave the head out of DistributedDataParallel.

    The values are those of rank 0. A head on the meta device (`device="meta"`) is allocated and drawn here, so that no process
    ever holds it whole.

    Args:
        head: a head of `gistops.nn`.
        mesh: a mesh of one dimension. By default all processes of the default process group; without an initialized
            `torch.distributed`, the head stays as it is, but for the values of a head on the meta device, which are drawn.
        seed: draws the values of a head on the meta device, which do not depend on the number of processes; by default
            `torch.initial_seed()` of rank 0.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or does not fit; the message names it.
        RuntimeError: a parameter is parametrized.
    """
    if not isinstance(head, MaxCosineHead):
        raise TypeError(f"head: expected a head of gistops.nn, got {type(head).__name__}")
    if seed is not None:
        seed = check_integer("seed", seed, 0, 2**63 - 1)
    if mesh is None and dist.is_available() and dist.is_initialized():
        type_ = head.centers.device.type
        mesh = init_device_mesh(_default_device() if type_ == "meta" else type_, (dist.get_world_size(),))
    if mesh is not None and not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh: expected a torch.distributed.DeviceMesh or None, got {type(mesh).__name__}")
    if mesh is not None and mesh.ndim != 1:
        raise ValueError(
            f"mesh: expected one dimension, got shape {tuple(mesh.shape)}; mesh['name'] is the submesh of a dimension"
        )
    if mesh is not None and mesh.get_coordinate() is None:
        raise ValueError(f"mesh: expected one with this process, rank {dist.get_rank()}, got {mesh}")
    names = [name for name, p in head._parameters.items() if p is not None]
    check_plain(head, "shard_classes", {*names, *head._per_class})
    check_whole(head, "shard_classes")
    on_meta = any(getattr(head, name).is_meta for name in names)
    device = head.centers.device
    if on_meta:
        device = torch.device(_default_device() if mesh is None else mesh.device_type)
    elif mesh is not None and device.type != mesh.device_type:
        raise ValueError(f"head: expected device type {mesh.device_type}, that of the mesh, got {device}")
    shards = None
    if mesh is not None:
        shards = Shards.on(mesh, head.num_classes)
        facts = {"head": type(head).__name__, "num_classes": head.num_classes, "meta device": on_meta}
        facts |= {name: (list(p.shape), p.dtype) for name, p in head.named_parameters(recurse=False)}
        shards.agree(facts, 0, 0, None)
    if on_meta:
        _draw(head, shards, device, seed)
    if shards is not None:
        _distribute(head, shards)
    return head


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _distribute(head: MaxCosineHead, shards: Shards) -> None:
    """Make the parameters of a head DTensors that are not yet."""
    for name, parameter in list(head._parameters.items()):
        if parameter is None or is_dtensor(parameter):
            continue
        placement = [Shard(0) if name in head._per_class else Replicate()]
        value = distribute_tensor(parameter.detach(), shards.mesh, placement)
        setattr(head, name, nn.Parameter(value, requires_grad=parameter.requires_grad))


@torch.no_grad()
def _draw(head: MaxCosineHead, shards: Shards | None, device: torch.device, seed: int | None) -> None:
    """Allocate the parameters of a head on the meta device, and draw those of this process's classes."""
    if seed is None:
        seed = torch.initial_seed() & (2**63 - 1)
        if shards is not None:
            seeds = [seed]
            with shards.collective():
                dist.broadcast_object_list(seeds, group=shards.host_group, group_src=0)
            seed = seeds[0]
    for name, parameter in list(head._parameters.items()):
        if parameter is None:
            continue
        if name in head._per_class:
            rows = _drawn_rows(f"{seed} {name}", parameter, shards)
            rows = (rows * head.in_features**-0.5).to(device, parameter.dtype)
            if shards is not None:
                rows = DTensor.from_local(
                    rows,
                    shards.mesh,
                    [Shard(0)],
                    shape=parameter.shape,
                    stride=parameter.stride(),
                    run_check=False,
                )
        else:
            rows = torch.empty_like(parameter, device=device)
        setattr(head, name, nn.Parameter(rows, requires_grad=parameter.requires_grad))
    head._reset_shared(_generator(f"{seed} shared"))


def _drawn_rows(seed: str, parameter: Tensor, shards: Shards | None) -> Tensor:
    """Return normal random numbers for the classes of this process, float32 on the CPU."""
    start, stop = (0, len(parameter)) if shards is None else (shards.start, shards.stop)
    rows = torch.empty(stop - start, *parameter.shape[1:], dtype=torch.float32, device="cpu")
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        first, last = block * BLOCK, min((block + 1) * BLOCK, len(parameter))
        shape, generator = (last - first, *parameter.shape[1:]), _generator(f"{seed} {block}")
        drawn = torch.randn(shape, generator=generator, device="cpu")
        low, high = max(first, start), min(last, stop)
        rows[low - start : high - start] = drawn[low - first : high - first]
    return rows


def _generator(seed: str) -> torch.Generator:
    digest = hashlib.sha256(seed.encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
