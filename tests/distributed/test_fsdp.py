"""FSDP2 (`fully_shard`) of a backbone beside a sharded head, against one process with the joint batch, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from gistops.distributed import shard_classes
from gistops.nn import GistClassifier

from ..processes import in_group

STEPS = 5
#: Rows of each process in the balanced and in the random stream.
ROWS = {"balanced": (3, 5), "random": (9, 2)}

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


class Model(nn.Module):
    """A backbone and a head, whose losses are computed in `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 12))
        self.head = GistClassifier(12, 7, 3, displacement_scale=0.5)

    def forward(self, x_balanced: Tensor, y_balanced: Tensor, x_random: Tensor, y_random: Tensor) -> Tensor:
        features = self.backbone(torch.cat([x_balanced, x_random]))
        f_balanced, f_random = features.tensor_split([len(x_balanced)])
        balanced, random = self.head.losses(f_balanced, y_balanced, f_random, y_random)
        return 0.5 * balanced + random


def new_model() -> Model:
    torch.manual_seed(5)
    return Model().double()


def batch(step: int, rank: int | None) -> Batch:
    """Return the batch of a process, or the joint batch for None."""
    generator = torch.Generator().manual_seed(step)
    tensors: list[Tensor] = []
    for sizes in ROWS.values():
        x = torch.randn(sum(sizes), 6, generator=generator, dtype=torch.float64)
        y = torch.randint(7, (sum(sizes),), generator=generator)
        tensors += [part if rank is None else part.split(sizes)[rank] for part in (x, y)]
    return tensors[0], tensors[1], tensors[2], tensors[3]


def sgd(parameters: list[nn.Parameter]) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.9, weight_decay=1e-3)


def compare(found: Tensor | None, expected: Tensor | None, name: str) -> None:
    assert isinstance(found, DTensor), name
    whole = found.full_tensor()
    torch.testing.assert_close(whole, expected, rtol=1e-10, atol=1e-12, msg=lambda text: f"{name}: {text}")


def _trains_as_one_process(rank: int, whole_model: bool) -> None:
    alone, model = new_model(), new_model()
    mesh = init_device_mesh("cpu", (2,))
    shard_classes(model.head, mesh)
    own = list(model.head.parameters())
    for layer in (model.backbone[0], model.backbone[2]):
        fully_shard(layer, mesh=mesh)
    if whole_model:
        fully_shard(model, mesh=mesh, ignored_params=set(own))
    else:
        fully_shard(model.backbone, mesh=mesh)
    assert list(model.head.parameters()) == own
    assert model.head.centers.placements == (Shard(0),)
    assert len(model.head.centers.to_local()) == (4, 3)[rank]
    optimizers = [
        sgd(list(alone.parameters())),
        sgd(list(model.backbone.parameters())),
        sgd(list(model.head.parameters())),
    ]
    for step in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        expected, loss = alone(*batch(step, None)), model(*batch(step, rank))
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        expected.backward()
        loss.backward()
        for (name, wanted), found in zip(alone.named_parameters(), model.parameters(), strict=True):
            compare(found.grad, wanted.grad, f"step {step}, gradient of {name}")
        for optimizer in optimizers:
            optimizer.step()
    for (name, wanted), found in zip(alone.named_parameters(), model.parameters(), strict=True):
        compare(found, wanted, name)


@pytest.mark.parametrize("whole_model", [False, True], ids=["backbone", "whole model without the head"])
def test_the_backbone_is_sharded_by_fsdp(whole_model: bool, tmp_path: Path) -> None:
    in_group(_trains_as_one_process, 2, tmp_path, whole_model)
