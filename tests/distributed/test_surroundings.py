"""Sharded heads under other defaults of PyTorch, in a part of the processes, and with a parametrization."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import parametrize

from gistops.distributed import shard_classes
from gistops.distributed.checkpoint_names import memory_for
from gistops.distributed.ranks import on_all_ranks
from gistops.nn import ConstellationClassifier

from ..processes import in_group

K, D, B = 11, 8, 5
SIZE = 2


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class TwoArguments(Exception):
    """An exception that pickle writes and cannot read."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


class WithFunction(Exception):
    """An exception that pickle cannot write."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.function = lambda: None


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(B, D, device="cpu"), torch.randint(K, (B,), device="cpu")


def check_default_device() -> None:
    """The host's tensors are on the CPU whatever the default device is; that of others is often a GPU."""
    mesh, (x, y) = init_device_mesh("cpu", (SIZE,)), batch()
    torch.set_default_device("meta")
    try:
        head = shard_classes(ConstellationClassifier(D, K, 2), mesh, seed=1)
        loss = head.loss(x, y)
        loss.backward()
        scalar = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(), [])
        step = memory_for(scalar, head.centers)
    finally:
        torch.set_default_device(None)
    other = shard_classes(ConstellationClassifier(D, K, 2, device="meta"), mesh, seed=1)
    assert torch.equal(loss, other.loss(x, y))
    assert step is not None
    assert step.device.type == "cpu"


def check_inference_mode() -> None:
    x, y = batch()
    for device in ("cpu", "meta"):
        head = ConstellationClassifier(D, K, 2, device=device)
        with torch.inference_mode():
            shard_classes(head)
        head.loss(x, y).backward()
        assert head.centers.grad is not None


def check_learned_bias_without_gradients() -> None:
    """A whole vector that could learn, where nothing does."""
    head, bias, (x, y) = shard_classes(ConstellationClassifier(D, K)), nn.Parameter(torch.randn(K)), batch()
    assert torch.equal(head.predict(x, class_bias=bias), head.predict(x, class_bias=bias.detach()))
    with torch.no_grad():
        assert torch.equal(head.loss(x, y, class_bias=bias), head.loss(x, y, class_bias=bias.detach()))


def check_mesh_of_another_process(rank: int) -> None:
    mesh = DeviceMesh("cpu", [0])
    head, (x, y) = ConstellationClassifier(D, K), batch()
    if rank:
        with pytest.raises(ValueError, match="mesh: expected one with this process, rank 1, got DeviceMesh"):
            shard_classes(head, mesh)
    else:
        expected = head.loss(x, y).detach()
        torch.testing.assert_close(
            shard_classes(head, mesh).loss(x, y), expected
        )  # other ops, other roundings


def check_parametrized(rank: int) -> None:
    """Sampled losses reach the parameters from which a parametrization computes the centers."""
    torch.manual_seed(rank)
    head, (x, y) = shard_classes(ConstellationClassifier(D, K, 2)), batch()
    parametrize.register_parametrization(head, "centers", Doubled())
    gradients = []
    for share in (None, 1.0):  # all classes
        head.zero_grad()
        head.loss(x, y, sample_negatives=share).backward()
        gradients.append(head.parametrizations.centers.original.grad.full_tensor())  # type: ignore[union-attr, index, operator]
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0])


def check_frozen_in_one_process(rank: int) -> None:
    """If nothing else needs a gradient, a process whose part needs none would have no backward for the others."""
    head, (x, y) = shard_classes(ConstellationClassifier(D, K)).requires_grad_(False), batch()
    head.centers.requires_grad_(rank == 0)
    with pytest.raises(ValueError, match=r"requires_grad of centers: expected the same .* True .* and False"):
        head.loss(x, y)
    head.centers.requires_grad_(False)
    bias = distribute_tensor(torch.zeros(K), head.centers.device_mesh, [Shard(0)]).requires_grad_(rank == 0)
    with pytest.raises(
        ValueError, match=r"class_bias: expected the same .* that needs a gradient on rank 0 and"
    ):
        head.loss(x, y, class_bias=bias)


def check_exceptions(rank: int) -> None:
    """Exceptions of one process that cannot be sent as they are end an action in all of them."""
    for error in (TwoArguments("one", "two"), WithFunction("text")):

        def action(error: Exception = error) -> None:
            if rank:
                raise error

        name = type(error).__name__
        with pytest.raises(
            type(error) if rank else RuntimeError, match=str(error) if rank else f"{name}: {error}"
        ):
            on_all_ranks(action)
        dist.barrier()


def check(rank: int) -> None:
    check_exceptions(rank)
    check_default_device()
    check_inference_mode()
    check_learned_bias_without_gradients()
    check_mesh_of_another_process(rank)
    check_parametrized(rank)
    check_frozen_in_one_process(rank)


def test_surroundings(tmp_path: Path) -> None:
    in_group(check, SIZE, tmp_path)
