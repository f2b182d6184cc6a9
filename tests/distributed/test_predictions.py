"""Predictions, slot usage and changes of sharded heads, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from gistops.distributed import shard_classes
from gistops.nn import (
    ConstellationClassifier,
    GistClassifier,
    SlotUsage,
    SubcenterClassifier,
    TwoHeadClassifier,
)
from gistops.nn.head import MaxCosineHead

from ..processes import in_group
from .test_sharded import TOLERANCE, D, compare, make_head, rows_of, whole

N = 23


def check_predictions(rank: int, size: int, mesh: Any, kind: str, classes: int) -> None:
    torch.manual_seed(classes)
    x = torch.randn(N, D, dtype=torch.float64)
    bias = torch.rand(classes, dtype=torch.float64)
    alone, sharded = make_head(kind, classes), shard_classes(make_head(kind, classes), mesh)
    mine = rows_of(rank, size, N)
    for k in {1, min(7, classes), classes}:
        expected = alone.predict_topk(x, k, class_bias=bias)
        found = sharded.predict_topk(x[mine], k, class_bias=bias)
        same = sharded.predict_topk(distribute_tensor(x, mesh, [Replicate()]), k, class_bias=bias)
        for a, b, c in zip(found, same, expected, strict=True):
            torch.testing.assert_close(a, c[mine], **TOLERANCE)
            torch.testing.assert_close(b, c, **TOLERANCE)
    assert torch.equal(sharded.predict(x[mine][None]), alone.predict(x)[mine][None])


def check_both_heads(rank: int, size: int, mesh: Any, classes: int) -> None:
    torch.manual_seed(classes)
    x, bias = torch.randn(N, D, dtype=torch.float64), torch.rand(classes, dtype=torch.float64)
    gist: Any = make_head("gist", classes)
    alone = gist.export(heads="both", class_bias=bias)
    sharded = shard_classes(gist, mesh).export(heads="both", class_bias=bias)
    mine, more = rows_of(rank, size, N), bias.flip(0)
    for k in {1, classes}:
        expected = alone.predict_topk(x, k, class_bias=more)
        for a, b in zip(sharded.predict_topk(x[mine], k, class_bias=more), expected, strict=True):
            torch.testing.assert_close(a, b[mine], **TOLERANCE)
    assert torch.equal(sharded.predict(x[mine]), alone.predict(x)[mine])
    with pytest.raises(TypeError, match="random: expected a head that is sharded if and only if balanced is"):
        TwoHeadClassifier(sharded.balanced, alone.random)


def check_ties(rank: int, size: int, mesh: Any) -> None:
    """Check that the lowest of equal classes comes first, also across processes, and that NaN is the largest value."""
    head = ConstellationClassifier(D, 9, 0)
    with torch.no_grad():
        head.centers.zero_()[:, 0] = 1  # products without rounding
    sharded = shard_classes(head, mesh)
    x = torch.randn(5, D)
    for k in (1, 4, 9):
        assert torch.equal(sharded.predict_topk(x, k).classes, torch.arange(k).expand(5, k))
    bias = torch.zeros(9)
    bias[3] = torch.nan
    bias[7] = -torch.inf
    classes = sharded.predict_topk(x, 9, class_bias=bias).classes
    assert torch.equal(classes, torch.tensor([3, 0, 1, 2, 4, 5, 6, 8, 7]).expand(5, 9))


def check_usage(rank: int, size: int, mesh: Any, kind: str) -> None:
    torch.manual_seed(8)
    x, y = torch.randn(N, D, dtype=torch.float64), torch.randint(31, (N,))
    alone, sharded = make_head(kind, 31), shard_classes(make_head(kind, 31), mesh)
    mine = rows_of(rank, size, N)
    torch.testing.assert_close(sharded.slot_usage(x[mine], y[mine]), alone.slot_usage(x, y))
    torch.testing.assert_close(sharded.slot_usage(x[mine]), alone.slot_usage(x))
    usages = SlotUsage(alone), SlotUsage(sharded)
    for _ in range(2):
        usages[0].update(x, y)
        usages[1].update(x[mine], y[mine])
    assert torch.equal(usages[0].counts, usages[1].counts)


def check_changes(rank: int, size: int, mesh: Any) -> None:
    torch.manual_seed(20 + rank)  # the values of rank 0 count
    head = shard_classes(GistClassifier(D, 31, 0, dtype=torch.float64), mesh)
    head.add_displacements(3)
    values: list[Any] = [None] * size
    dist.all_gather_object(values, [whole(p).detach() for p in head.parameters()])
    assert all(torch.equal(a, b) for other in values for a, b in zip(values[0], other, strict=True))
    x, y = torch.randn(4, D, dtype=torch.float64), torch.randint(31, (4,))
    expected = head.predict_topk(x, 3)
    exported = head.export()
    for a, b in zip(exported.predict_topk(x, 3), expected, strict=True):
        assert torch.equal(a, b)
    (sum(head.losses(x, y, x, y))).backward()
    with pytest.raises(TypeError, match=r"centers: expected a local torch\.Tensor, got a DTensor.*top-k"):
        head(x)
    for method in (
        head.freeze,
        head.reset_parameters,
        lambda: head.add_classes(2),
        lambda: shard_classes(head, mesh),
    ):
        with pytest.raises(RuntimeError, match="expected a head whose parameters are not DTensors"):
            method()


def check_meta(rank: int, size: int, mesh: Any) -> None:
    """Check that the values of a head on the meta device depend on the seed alone, not on the number of processes."""
    for kind in (
        lambda: ConstellationClassifier(3, 70_001, 2, device="meta"),
        lambda: GistClassifier(D, 31, 2, device="meta", transform="rotation"),
        lambda: ConstellationClassifier(D, 31, 2, device="meta", transform="mlp"),
        lambda: SubcenterClassifier(D, 31, device="meta", dtype=torch.float64),
    ):
        alone = init_device_mesh("cpu", (size,))
        one: MaxCosineHead = shard_classes(kind(), _one_process_mesh(rank, size), seed=4)
        head = shard_classes(kind(), alone, seed=4)
        other = shard_classes(kind(), alone, seed=5)
        for (name, p), q, r in zip(
            head.named_parameters(), one.parameters(), other.parameters(), strict=True
        ):
            torch.testing.assert_close(whole(p), whole(q), msg=lambda text, name=name: f"{name}: {text}")
            assert p.requires_grad
            assert "tau" in name or not torch.equal(whole(p), whole(r))
        centers = whole(head.centers).detach().float()
        assert abs(float(centers.std()) * centers.shape[-1] ** 0.5 - 1) < 0.1
        assert abs(float(head.tau.detach()) - 16) < 1e-3


def _one_process_mesh(rank: int, size: int) -> Any:
    """Return a mesh with this process alone."""
    return init_device_mesh("cpu", (size, 1), mesh_dim_names=("a", "b"))["b"]


def _all(rank: int, size: int) -> None:
    mesh = init_device_mesh("cpu", (size,))
    for kind in ("translation", "plain", "rotation", "mlp", "subcenters", "gist"):
        check_predictions(rank, size, mesh, kind, 31)
    for classes in (1, 2, 5):
        check_predictions(rank, size, mesh, "translation", classes)
    check_both_heads(rank, size, mesh, 31)
    check_both_heads(rank, size, mesh, 2)
    check_ties(rank, size, mesh)
    for kind in ("translation", "plain", "rotation", "mlp"):
        check_usage(rank, size, mesh, kind)
    check_changes(rank, size, mesh)
    check_meta(rank, size, mesh)


@pytest.mark.parametrize("size", [2, 3])
def test_predictions_usage_and_changes(size: int, tmp_path: Path) -> None:
    in_group(_all, size, tmp_path, size)


def test_without_processes() -> None:
    """Without torch.distributed the head stays as it is; one on the meta device gets values."""
    head = ConstellationClassifier(D, 31, 2)
    before = [p.detach().clone() for p in head.parameters()]
    assert shard_classes(head) is head
    assert all(torch.equal(a, b) for a, b in zip(before, head.parameters(), strict=True))
    drawn = [shard_classes(GistClassifier(D, 31, 2, device="meta"), seed=1) for _ in range(2)]
    for p, q in zip(drawn[0].parameters(), drawn[1].parameters(), strict=True):
        assert type(p.data) is Tensor
        assert torch.equal(p, q)
    drawn[0].loss(torch.randn(3, D), torch.tensor([0, 1, 30])).backward()
    compare(drawn[0].centers.detach(), drawn[1].centers.detach(), "centers")


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"head: expected a head of gistops\.nn, got Linear"):
        shard_classes(torch.nn.Linear(2, 2))  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"mesh: expected a torch\.distributed\.DeviceMesh or None, got int"):
        shard_classes(ConstellationClassifier(D, 3), 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed: expected an integer from 0"):
        shard_classes(ConstellationClassifier(D, 3), seed=-1)
