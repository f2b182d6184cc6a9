"""Fifty training steps with a sharded head: losses and final weights are those of one process on the joint batch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from gistops.distributed import shard_classes
from gistops.nn import ConstellationClassifier, GistClassifier, SubcenterClassifier
from gistops.nn.head import MaxCosineHead

from ..processes import groups_in_turn, in_group
from .test_sharded import whole

STEPS, FEATURES, D = 50, 6, 12


class Case(NamedTuple):
    head: str
    classes: int
    optimizer: str
    ddp: bool = True  # the backbone is in DistributedDataParallel; otherwise its gradients are averaged here
    bias: str = "none"  # of the balanced loss: "whole" or "sharded"


CASES = (
    Case("translation", 101, "SGD"),
    Case("translation", 3, "AdamW", ddp=False),
    Case("rotation", 23, "AdamW"),
    Case("gist", 67, "SGD", bias="sharded"),
    Case("gist", 67, "AdamW", ddp=False, bias="whole"),
    Case("gist", 2, "SGD"),
    Case("subcenters", 59, "SGD", ddp=False),
    Case("subcenters", 3, "fused AdamW"),
)


def make_model(case: Case) -> tuple[nn.Module, MaxCosineHead]:
    torch.manual_seed(11)
    backbone = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, D)).double()
    options: dict[str, Any] = {"dtype": torch.float64}
    if case.head == "subcenters":
        return backbone, SubcenterClassifier(D, case.classes, 3, **options)
    options["displacement_scale"] = 1.0
    if case.head == "gist":
        return backbone, GistClassifier(D, case.classes, 3, **options)
    return backbone, ConstellationClassifier(D, case.classes, 3, transform=case.head, **options)  # type: ignore[arg-type]


def make_optimizer(case: Case, backbone: nn.Module, head: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer; plain parameters and DTensors are in groups of their own, since foreach takes no mix."""
    decayed = [p for name, p in head.named_parameters() if p.dim() > 1]
    others = [p for name, p in head.named_parameters() if p.dim() == 1]
    groups = [
        {"params": list(backbone.parameters()), "weight_decay": 1e-3},
        {"params": decayed, "weight_decay": 1e-2},
        {"params": others, "weight_decay": 0.0},
    ]
    if case.optimizer == "SGD":
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    return torch.optim.AdamW(groups, lr=0.01, fused=case.optimizer == "fused AdamW")


def batches(case: Case, size: int, seed: int) -> Iterable[list[tuple[Tensor, Tensor]]]:
    """Yield the samples of each process for each step: uneven, and one process has none in every other step."""
    counts_generator, generator = torch.Generator().manual_seed(5), torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        counts = torch.randint(1, 9, (size,), generator=counts_generator).tolist()
        counts[step // 2 % size] *= step % 2
        yield [
            (
                torch.randn(n, FEATURES, dtype=torch.float64, generator=generator),
                torch.randint(case.classes, (n,), generator=generator),
            )
            for n in counts
        ]


def loss_of(
    case: Case,
    backbone: nn.Module,
    head: Any,
    streams: list[Tensor],
    labels: list[Tensor],
    bias: Tensor | None,
) -> Tensor:
    features = backbone(torch.cat(streams)).split([len(x) for x in streams])
    if case.head == "gist":
        balanced, random = head.losses(features[0], labels[0], features[1], labels[1], balanced_bias=bias)
        return random + 0.5 * balanced
    options: dict[str, Any] = {"margin": 0.3, "margin_kind": "angle"} if case.head == "subcenters" else {}
    return head.loss(torch.cat(features), torch.cat(labels), **options)


def trained(
    case: Case, size: int, rank: int | None, mesh: DeviceMesh
) -> tuple[list[float], dict[str, Tensor]]:
    """Train; return the losses and the final weights. rank None: one process with the samples of all."""
    backbone, head = make_model(case)
    bias = torch.linspace(-1, 1, case.classes, dtype=torch.float64) if case.bias != "none" else None
    model = backbone
    if rank is not None:
        head = shard_classes(head, mesh)
        if bias is not None and case.bias == "sharded":
            bias = distribute_tensor(bias, mesh, [Shard(0)])
        if case.ddp:
            model = nn.parallel.DistributedDataParallel(backbone)
    optimizer = make_optimizer(case, backbone, head)
    losses = []
    chosen = slice(None) if rank is None else slice(rank, rank + 1)
    for both in zip(batches(case, size, 1), batches(case, size, 2), strict=True):
        streams = [torch.cat([x for x, _ in stream[chosen]]) for stream in both]
        labels = [torch.cat([y for _, y in stream[chosen]]) for stream in both]
        loss = loss_of(case, model, head, streams, labels, bias)
        optimizer.zero_grad()
        loss.backward()
        if rank is not None and not case.ddp:
            for p in backbone.parameters():
                dist.all_reduce(p.grad)
                p.grad /= size  # type: ignore[operator]
        optimizer.step()
        losses.append(loss.item())
    named = [*backbone.named_parameters(), *head.named_parameters()]
    return losses, {name: whole(p.detach()) for name, p in named}


#: The number of processes -> its cases.
TURNS = {2: CASES[:4], 3: CASES[4:], 4: CASES[1::2]}


def check_training(rank: int, folder: Path) -> None:
    for _, size in groups_in_turn(rank, tuple(TURNS), folder):
        mesh = init_device_mesh("cpu", (size,))
        for case in TURNS[size]:
            expected, weights = trained(case, size, None, mesh)
            found, own = trained(case, size, rank, mesh)
            torch.testing.assert_close(
                found, expected, rtol=1e-10, atol=0, msg=f"{case}: {found}, not {expected}"
            )
            for name, value in weights.items():
                difference = (own[name] - value).abs().max() / value.abs().max()
                assert difference < 1e-10, f"{size} processes, {case}: {name} differs by {difference:.2e}"


def test_fifty_steps(tmp_path: Path) -> None:
    in_group(check_training, max(TURNS), tmp_path, tmp_path)
