"""torch.compile around a sharded head, which is a graph break: its collectives run in eager mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gistops.distributed import shard_classes
from gistops.nn import GistClassifier

from ..processes import in_group
from .test_sharded import D, compare, make_head, rows_of, whole

N, FEATURES = 17, 11


class Model(nn.Module):
    """A backbone and a head, with the loss in forward."""

    def __init__(self, mesh: DeviceMesh | None, kind: str) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.backbone = nn.Sequential(nn.Linear(FEATURES, D), nn.GELU(), nn.Linear(D, D)).double()
        self.head = make_head(kind, 31)
        if mesh is not None:
            shard_classes(self.head, mesh)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        features = self.backbone(x)
        if isinstance(self.head, GistClassifier):
            balanced, random = self.head.losses(features, y, 2 * features, y)
            loss = random + 0.5 * balanced
        else:
            loss = self.head.loss(features, y, label_smoothing=0.1)
        return loss + 1e-3 * features.square().sum() / N


def check_compiled(rank: int, size: int) -> None:
    mesh = init_device_mesh("cpu", (size,))
    mine = rows_of(rank, size, N)
    torch.manual_seed(1)
    x, y = torch.randn(2, N, FEATURES, dtype=torch.float64), torch.randint(31, (2, N))
    for kind, backend in (("translation", "inductor"), ("gist", "aot_eager"), ("subcenters", "aot_eager")):
        for whole_module in (False, True):
            torch._dynamo.reset()
            counters.clear()
            eager, model = Model(mesh, kind), Model(mesh, kind)
            function: Any = model
            if whole_module:
                function = torch.compile(model, backend=backend)
            else:
                model.backbone = torch.compile(model.backbone, backend=backend)  # type: ignore[assignment]
            for step in range(2):
                losses = [f(x[step, mine], y[step, mine]) for f in (eager, function)]
                for loss in losses:
                    loss.backward()
                compare(losses[1], losses[0].detach(), f"{kind} loss")
            assert counters["stats"]["unique_graphs"] > 0
            for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
                assert q.grad is not None, name
                compare(p.grad, whole(q.grad), f"{kind} {name}")


def test_compiled_around_the_head(tmp_path: Path) -> None:
    in_group(check_compiled, 2, tmp_path, 2)
