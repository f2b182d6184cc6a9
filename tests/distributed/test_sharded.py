"""Heads whose classes are divided between processes, against one process on the joint batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from gistops.distributed import shard_classes
from gistops.nn import ConstellationClassifier, GistClassifier, SubcenterClassifier
from gistops.nn.head import MaxCosineHead

from ..processes import in_group

D = 19
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12, "equal_nan": True}


def rows_of(rank: int, size: int, total: int) -> slice:
    """Return an uneven part of the rows: rank 1 has none, rank 0 twice as many as the last ones."""
    weights = [2 if r == 0 else 0 if r == 1 else 1 for r in range(size)] if size > 1 else [1]
    ends = [round(total * sum(weights[: r + 1]) / sum(weights)) for r in range(size)]
    return slice(0 if rank == 0 else ends[rank - 1], ends[rank])


def make_head(kind: str, classes: int) -> MaxCosineHead:
    torch.manual_seed(7)
    if kind == "subcenters":
        return SubcenterClassifier(D, classes, 3, dtype=torch.float64)
    if kind == "gist":
        return GistClassifier(D, classes, 3, dtype=torch.float64, displacement_scale=1.0)
    options: dict[str, Any] = {} if kind == "plain" else {"transform": kind}
    num = 0 if kind == "plain" else 3
    return ConstellationClassifier(D, classes, num, dtype=torch.float64, displacement_scale=1.0, **options)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def compare(found: Tensor | None, expected: Tensor | None, what: str) -> None:
    if expected is None or found is None:
        assert found is None or not whole(found).any(), what
        assert expected is None or not expected.any(), what
        return
    torch.testing.assert_close(whole(found), expected, **TOLERANCE, msg=lambda text: f"{what}: {text}")


def options_of(name: str, classes: int) -> dict[str, Any]:
    """Return loss options by name; vectors are whole."""
    g = torch.Generator().manual_seed(3)
    vector = torch.rand(classes, dtype=torch.float64, generator=g)
    excluded = (vector < 0.3) & (torch.arange(classes) < classes - 1)
    return {
        "none": {},
        "sum": {"reduction": "sum"},
        "per row": {"reduction": "none", "return_lse": True},
        "bias": {"class_bias": vector - 0.5, "return_lse": True},
        "weight": {"weight": vector},
        "margins": {"margin": vector, "margin_kind": "angle"},
        "margin": {"margin": torch.tensor(0.3, dtype=torch.float64, requires_grad=True), "margin_kind": "cosine"},
        "smoothing": {"label_smoothing": 0.1},
        "all": {
            "class_bias": vector - 0.5,
            "weight": vector.flip(0),
            "margin": vector / 2,
            "margin_kind": "angle",
            "label_smoothing": 0.2,
        },
        "excluded": {"class_bias": torch.where(excluded, -torch.inf, vector), "ignore_index": 0},
    }[name]


OPTIONS = ("none", "sum", "per row", "bias", "weight", "margins", "margin", "smoothing", "all", "excluded")


def objective(output: Any, weights: Tensor) -> Tensor:
    """Return a scalar that depends on all outputs; weights: of each row of this process."""
    outputs = output if isinstance(output, tuple) else (output,)
    return sum((t * weights[: t.numel()].view(t.shape)).sum() if t.dim() else t for t in outputs)


def check_loss(rank: int, size: int, mesh: Any, kind: str, classes: int, name: str, backend: str | None) -> None:
    torch.manual_seed(classes)
    total = 23
    x = torch.randn(total, D, dtype=torch.float64)
    y = torch.randint(classes, (total,))
    y[5] = options_of(name, classes).get("ignore_index", -100)
    row_weights = torch.rand(total, dtype=torch.float64)
    alone, sharded = make_head(kind, classes), shard_classes(make_head(kind, classes), mesh)
    alone.backend = sharded.backend = backend
    mine = rows_of(rank, size, total)
    # one process
    whole_x = x.clone().requires_grad_()
    options = options_of(name, classes)
    expected = alone.loss(whole_x, y, **options)
    per_row = isinstance(expected, tuple) or expected.dim() > 0
    value = objective(expected, row_weights)
    # The objective of the processes is the mean of theirs; scalars are the same in all.
    if per_row:
        parts = expected if isinstance(expected, tuple) else (expected,)
        scalars = sum(t for t in parts if t.dim() == 0)
        value = scalars + objective(tuple(t for t in parts if t.dim()), row_weights) / size
    value.backward()
    # this one
    own = x[mine].clone().requires_grad_()
    options_sharded = options_of(name, classes)
    for key in ("class_bias", "weight", "margin"):
        if isinstance(v := options_sharded.get(key), Tensor) and v.dim() and key != "weight":
            options_sharded[key] = nn.Parameter(distribute_tensor(v, mesh, [Shard(0)]))
            options[key].requires_grad_()
    found = sharded.loss(own, y[mine], **options_sharded)
    label = f"{kind} {classes} {name} {backend}"
    for i, (a, b) in enumerate(zip(found if isinstance(found, tuple) else (found,), expected if isinstance(expected, tuple) else (expected,), strict=True)):
        torch.testing.assert_close(a, b[mine] if b.dim() else b, **TOLERANCE, msg=lambda t: f"{label} output {i}: {t}")
    objective(found, row_weights[mine]).backward()
    assert whole_x.grad is not None
    compare(own.grad, whole_x.grad[mine] * size, f"{label} input")
    for (key, p), q in zip(sharded.named_parameters(), alone.parameters(), strict=True):
        compare(p.grad, q.grad, f"{label} {key}")
    if isinstance(m := options.get("margin"), Tensor) and m.dim() == 0:
        compare(options_sharded["margin"].grad, m.grad, f"{label} margin")


def _losses(rank: int, size: int, backend: str | None) -> None:
    mesh = init_device_mesh("cpu", (size,))
    for kind in ("translation", "plain", "rotation", "mlp", "subcenters"):
        for name in OPTIONS:
            check_loss(rank, size, mesh, kind, 101, name, backend)
    for classes in (1, 2, 3, 5):
        for name in OPTIONS:
            check_loss(rank, size, mesh, "translation", classes, name, backend)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_losses_and_gradients(size: int, tmp_path: Path) -> None:
    in_group(_losses, size, tmp_path, size, None)
