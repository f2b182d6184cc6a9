"""Heads whose classes are divided between processes, against one process on the joint batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
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
        "margin": {
            "margin": torch.tensor(0.3, dtype=torch.float64, requires_grad=True),
            "margin_kind": "cosine",
        },
        "smoothing": {"label_smoothing": 0.1},
        "all": {
            "class_bias": vector - 0.5,
            "weight": vector.flip(0),
            "margin": vector / 2,
            "margin_kind": "angle",
            "label_smoothing": 0.2,
        },
        "excluded": {"class_bias": torch.where(excluded, -torch.inf, vector), "ignore_index": 0},
        "half excluded": {  # all classes of some processes
            "class_bias": torch.where(torch.arange(classes) > classes // 2, -torch.inf, vector),
            "reduction": "none",
        },
    }[name]


OPTIONS = (
    *("none", "sum", "per row", "bias", "weight", "margins", "margin", "smoothing", "all"),
    *("excluded", "half excluded"),
)


def as_tuple(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def objective(output: Any, weights: Tensor) -> Tensor:
    """Return a scalar that depends on all outputs; weights: of each row of this process."""
    return sum((t * weights[: t.numel()].view(t.shape)).sum() if t.dim() else t for t in as_tuple(output))


def check_loss(
    rank: int, size: int, mesh: Any, kind: str, classes: int, name: str, backend: str | None
) -> None:
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
    learned = [key for key in ("class_bias", "margin") if isinstance(options.get(key), Tensor)]
    for key in learned:
        options[key].requires_grad_()
    expected = alone.loss(whole_x, y, **options)
    # The objective is the mean over the processes, which have the same scalars, and a part of the rows each.
    objective(expected, row_weights / size).backward()
    # this one
    own = x[mine].clone().requires_grad_()
    options_sharded = options_of(name, classes)
    for key in learned:
        if options_sharded[key].dim():
            options_sharded[key] = nn.Parameter(distribute_tensor(options_sharded[key], mesh, [Shard(0)]))
    found = sharded.loss(own, y[mine], **options_sharded)
    label = f"{kind} {classes} {name} {backend}"
    for a, b in zip(as_tuple(found), as_tuple(expected), strict=True):
        compare(a, b[mine] if b.dim() else b, label)
    objective(found, row_weights[mine]).backward()
    assert whole_x.grad is not None
    compare(own.grad, whole_x.grad[mine] * size, f"{label} input")
    for (key, p), q in zip(sharded.named_parameters(), alone.parameters(), strict=True):
        compare(p.grad, q.grad, f"{label} {key}")
    for key in learned:
        compare(options_sharded[key].grad, options[key].grad, f"{label} {key}")


def _losses(rank: int, size: int) -> None:
    mesh = init_device_mesh("cpu", (size,))
    for name in OPTIONS:
        for classes in (101, 5):
            check_loss(rank, size, mesh, "translation", classes, name, None)
    for kind in ("plain", "rotation", "mlp", "subcenters"):
        for name in ("per row", "all"):
            check_loss(rank, size, mesh, kind, 101, name, None)
    for classes in (1, 2, 3):
        check_loss(rank, size, mesh, "translation", classes, "all", "reference")
    check_two_streams(rank, size, mesh)
    check_sampled(rank, size, mesh)
    check_same_rows(rank, size, mesh)


def check_two_streams(rank: int, size: int, mesh: Any) -> None:
    """Check `GistClassifier.losses`: its two streams and its blocked gradients."""
    torch.manual_seed(1)
    x = torch.randn(2, 17, D, dtype=torch.float64)
    y = torch.randint(47, (2, 17))
    bias = torch.rand(47, dtype=torch.float64)
    mine = rows_of(rank, size, 17)
    alone, sharded = make_head("gist", 47), shard_classes(make_head("gist", 47), mesh)
    for head, rows in ((alone, slice(None)), (sharded, mine)):
        balanced, random = head.losses(x[0, rows], y[0, rows], x[1, rows], y[1, rows], balanced_bias=bias)
        (random + 0.5 * balanced).backward()
    for (name, p), q in zip(sharded.named_parameters(), alone.parameters(), strict=True):
        compare(p.grad, q.grad, name)


def check_sampled(rank: int, size: int, mesh: Any) -> None:
    """Check a loss over drawn classes: it is that of a classifier with the classes that all processes have drawn."""
    torch.manual_seed(2)
    classes = 97
    x, y = torch.randn(17, D, dtype=torch.float64), torch.randint(classes, (17,))
    mine = rows_of(rank, size, 17)
    sharded = shard_classes(make_head("translation", classes), mesh)
    own = x[mine].clone().requires_grad_()
    vector = torch.rand(classes, dtype=torch.float64)
    options = {"class_bias": vector, "margin": vector.flip(0), "margin_kind": "cosine"}
    generator = torch.Generator().manual_seed(5 + rank)
    loss = sharded.loss(own, y[mine], **options, sample_negatives=0.7, generator=generator)
    loss.backward()
    grad = sharded.centers.grad._local_tensor  # sparse
    assert grad.is_sparse
    chunk = -(-classes // size)
    drawn: list[Any] = [None] * size
    dist.all_gather_object(drawn, (grad.coalesce().indices()[0] + rank * chunk, grad.to_dense()))
    index = torch.cat([i for i, _ in drawn])
    assert torch.isin(y, index).all()
    assert 0.6 * classes < len(index) < 0.9 * classes
    alone = make_head("translation", classes)
    full = x.clone().requires_grad_()
    excluded = torch.full((classes,), -torch.inf, dtype=torch.float64)
    excluded[index] = vector[index]
    expected = alone.loss(full, y, **{**options, "class_bias": excluded})
    expected.backward()
    compare(loss, expected, "sampled loss")
    compare(own.grad, full.grad[mine] * size, "sampled input")
    compare(torch.cat([g for _, g in drawn]), alone.centers.grad, "sampled centers")
    compare(sharded.displacements.grad, alone.displacements.grad, "sampled displacements")


def check_same_rows(rank: int, size: int, mesh: Any) -> None:
    """Check input with placement Replicate: all processes have the same rows, and their gradients."""
    torch.manual_seed(3)
    x, y = torch.randn(11, D, dtype=torch.float64), torch.randint(23, (11,))
    alone, sharded = make_head("translation", 23), shard_classes(make_head("translation", 23), mesh)
    for reduction in ("mean", "none"):
        same = distribute_tensor(x, mesh, [Replicate()]).requires_grad_()
        full = x.clone().requires_grad_()
        found, expected = sharded.loss(same, y, reduction=reduction), alone.loss(full, y, reduction=reduction)
        compare(found, expected, "same rows")
        found.sum().backward()
        expected.sum().backward()
        compare(same.grad, full.grad, "gradient of the same rows")
    parts = distribute_tensor(x, mesh, [Shard(0)])
    compare(
        sharded.loss(parts, parts.to_local().new_zeros(len(parts.to_local())).long()),
        alone.loss(x, 0 * y),
        "parts",
    )
    for (name, p), q in zip(sharded.named_parameters(), alone.parameters(), strict=True):
        compare(p.grad, q.grad, name)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_losses_and_gradients(size: int, tmp_path: Path) -> None:
    in_group(_losses, size, tmp_path, size)
