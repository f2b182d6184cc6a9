"""Small models whose heads are sharded, and their training, the same with any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

from gistops.distributed import load_checkpoint, save_checkpoint, shard_classes
from gistops.nn import ConstellationClassifier, GistClassifier, SubcenterClassifier
from gistops.optim import RowOptimizer

from ..processes import groups_in_turn

INPUTS, FEATURES, BATCH, STEPS = 5, 6, 9, 3
EPS = 1e-3  # Adam multiplies the rounding errors of gradients by up to lr / eps

HEADS: dict[str, Callable[[], nn.Module]] = {
    "rotation": lambda: ConstellationClassifier(FEATURES, 7, 2, transform="rotation", dtype=torch.float64),
    "gist": lambda: GistClassifier(FEATURES, 2, 3, dtype=torch.float64),  # 2 classes for up to 4 processes
    "subcenters": lambda: SubcenterClassifier(FEATURES, 5, 2, dtype=torch.float64),
}


class Model(nn.Module):
    """A backbone and a head."""

    def __init__(self, case: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone: nn.Module = nn.Linear(INPUTS, FEATURES, dtype=torch.float64)
        self.head: Any = HEADS[case]()
        self.register_buffer("rank", torch.tensor(0))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        features = self.backbone(x)
        if isinstance(self.head, GistClassifier):
            balanced, random = self.head.losses(features, y, features, y)
            return random + 0.5 * balanced
        loss: Tensor = self.head.loss(features, y)
        return loss


def make(case: str, seed: int) -> tuple[Model, list[Optimizer]]:
    """Return a model and its optimizers, distributed over the processes if there is a process group.

    The parameter groups differ with and without a process group; the options of each parameter do not.
    """
    model = Model(case, seed)
    distributed = dist.is_initialized()
    if distributed:
        if case == "gist":
            fully_shard(model.backbone)
        else:
            model.backbone = DistributedDataParallel(model.backbone)
        shard_classes(model.head)
        model.rank.fill_(dist.get_rank())
    backbone, head = list(model.backbone.parameters()), list(model.head.parameters())
    if case == "subcenters":
        options = {"lr": 0.01, "eps": EPS, "weight_decay": 0.1, "amsgrad": True}
        return model, [SGD(backbone, 0.1), RowOptimizer(AdamW, head, **options)]
    groups: Any = [{"params": backbone}, {"params": head}] if distributed else [*backbone, *head]
    if case == "rotation":
        return model, [SGD(groups, 0.02, momentum=0.9, weight_decay=0.01, nesterov=True)]
    return model, [AdamW(groups, 0.01, eps=EPS)]


def batch(case: str, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Return this process's rows of the batch of a step. Ranks have different numbers of rows."""
    generator = torch.Generator().manual_seed(seed + 1000 * step)
    x = torch.randn(BATCH, INPUTS, dtype=torch.float64, generator=generator)
    y = torch.randint(HEADS[case]().num_classes, (BATCH,), generator=generator)
    if not dist.is_initialized():
        return x, y
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = slice(rank - 1, rank) if rank else slice(size - 1, None)
    return x[rows], y[rows]


def train(case: str, seed: int, model: Model, optimizers: list[Optimizer], first: int, last: int) -> None:
    """Train for the steps from `first` to before `last`."""
    for step in range(first, last):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model.loss(*batch(case, seed, step)).backward()
        for optimizer in optimizers:
            optimizer.step()


def train_in_turns(rank: int, sizes: tuple[int, ...], seed: int, folder: Path) -> None:
    """Train each model with groups of these sizes in turn; each group continues from the checkpoints of the one before."""
    for turn, _ in groups_in_turn(rank, sizes, folder):
        _continue(seed, folder / f"turn-{turn - 1}", folder / f"turn-{turn}")


def _continue(seed: int, source: Path, target: Path) -> None:
    for case in HEADS:
        model, optimizers = make(case, seed)
        step = 0
        if source.exists():
            step = load_checkpoint(source / case, model, optimizers)["step"]
            assert model.rank == 0
        train(case, seed, model, optimizers, step, step + STEPS)
        save_checkpoint(target / case, model, optimizers, extra={"step": step + STEPS})
