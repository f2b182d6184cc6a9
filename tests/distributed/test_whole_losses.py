"""The joint loss from whole losses over the classes of each process, as the kernels of GPUs compute them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from gistops.backends import eager_loss
from gistops.distributed import shard_classes
from gistops.functional.sharded import loss as sharded_loss
from gistops.nn import ConstellationClassifier, SubcenterClassifier
from gistops.nn.head import MaxCosineHead

from ..ops.oracle import allowed, error
from ..processes import in_group
from ..triton.test_interpreter import OUTDATED
from .test_sharded import OPTIONS, check_loss, objective, options_of, rows_of, whole

ROWS, D = 45, 37


def count_calls() -> list[str]:
    """Return a list that grows with each joint loss from whole losses."""
    calls: list[str] = []
    from_losses = sharded_loss._from_losses

    def counted(shards: Any, backend: str, *arguments: Any) -> Any:
        calls.append(backend)
        return from_losses(shards, backend, *arguments)

    sharded_loss._from_losses = counted
    return calls


def in_float64(rank: int, size: int) -> None:
    mesh = init_device_mesh("cpu", (size,))
    eager_loss.WHOLE_LOSS["reference"] = ("translation", "subcenters", "rotation")
    calls = count_calls()
    cases = [(kind, 53, name) for kind in ("subcenters", "rotation") for name in ("bias", "margins")]
    cases += [
        ("translation", classes, name) for classes in (53, 4) for name in OPTIONS
    ]  # of 4, rank 2 has none
    for kind, classes, name in cases:
        check_loss(rank, size, mesh, kind, classes, name, "reference")
    smoothed = [name for _, _, name in cases if options_of(name, 4).get("label_smoothing")]
    assert len(calls) == len(cases) - len(smoothed)


def test_in_float64(tmp_path: Path) -> None:
    in_group(in_float64, 3, tmp_path, 3)


def make_head(kind: str, classes: int, dtype: torch.dtype) -> MaxCosineHead:
    torch.manual_seed(7)
    head: MaxCosineHead
    if kind == "subcenters":
        head = SubcenterClassifier(D, classes, 3)
    else:
        head = ConstellationClassifier(D, classes, 3, transform=kind, displacement_scale=1.0)  # type: ignore[arg-type]
    head.backend = "reference"
    return head.to(dtype)


def call(
    head: MaxCosineHead,
    x: Tensor,
    y: Tensor,
    options: dict[str, Any],
    weights: Tensor,
    mesh: DeviceMesh | None,
) -> dict[str, Tensor]:
    """Return the outputs of a loss and its gradients; weights: of the outputs of each row."""
    dtype = head.centers.dtype
    x, learned = x.to(dtype, copy=True).requires_grad_(), {}
    for name, value in options.items():
        if isinstance(value, Tensor):
            value = value.detach().to(dtype, copy=True)
            if mesh is not None and value.dim():
                value = distribute_tensor(value, mesh, [Shard(0)])
            learned |= {name: value.requires_grad_(name != "weight")}
    output = head.loss(x, y, **options | learned)
    objective(output, weights.to(dtype)).backward()
    outputs = output if isinstance(output, tuple) else (output,)
    gradients = {"input": x, **dict(head.named_parameters()), **learned}
    return {
        **{f"output {i}": value for i, value in enumerate(outputs)},
        **{name: whole(leaf.grad) for name, leaf in gradients.items() if leaf.grad is not None},
    }


def check_float32(rank: int, size: int, kind: str, classes: int, name: str, backend: str) -> None:
    """Compare with one process in float64; errors may be a few times those of one process with PyTorch in float32."""
    torch.manual_seed(classes)
    x, y, weights = torch.randn(ROWS, D), torch.randint(classes, (ROWS,)), torch.rand(ROWS)
    options = options_of(name.removesuffix(", logit"), classes)
    y[3] = options.get("ignore_index", -100)
    if name.endswith("logit"):
        options |= {"margin_kind": "logit"}
    mesh, mine = init_device_mesh("cpu", (size,)), rows_of(rank, size, ROWS)
    expected, plain = (
        call(make_head(kind, classes, dtype), x, y, options, weights / size, None)
        for dtype in (torch.float64, torch.float32)
    )
    head = shard_classes(make_head(kind, classes, torch.float32), mesh)
    head.backend = backend
    found = call(head, x[mine], y[mine], options, weights[mine], mesh)
    assert found.keys() == expected.keys()
    tau = float(head.tau)
    for key, value in found.items():
        truth, rounded = expected[key], plain[key]
        if key == "input" or (key.startswith("output") and truth.dim()):
            truth, rounded = truth[mine], rounded[mine]
        if key == "input":
            truth, rounded = truth * size, rounded * size
        terms = ROWS * (classes if key == "raw_tau" else 1) + tau**2
        label = f"{kind}, {classes} classes, {name}, {key}"
        infinite = ~truth.isfinite()
        assert torch.allclose(value[infinite].double(), truth[infinite], equal_nan=True), label
        value, truth, rounded = (t.masked_fill(infinite, 0) for t in (value, truth, rounded))
        size_of_sum = torch.cat([truth.flatten(), truth.new_ones(1)])
        limit = allowed(error(rounded, truth), size_of_sum, torch.float32, round(terms))
        assert error(value, truth) <= limit, f"{label}: {error(value, truth):.3g} > {limit:.3g}"


def in_float32(rank: int, size: int, backend: str) -> None:
    calls = count_calls()
    names = ("per row", "bias", "weight", "margin", "margins", "margins, logit", "half excluded", "smoothing")
    for name in names:
        check_float32(rank, size, "translation", 101, name, backend)
    for kind in ("subcenters", "rotation"):
        for name in ("bias", "margins"):
            check_float32(rank, size, kind, 71, name, backend)
    for name in ("per row", "weight"):  # a process without classes
        check_float32(rank, size, "translation", 1, name, backend)
    assert calls == [backend] * (len(names) - 1 + 4 + 2)


@pytest.mark.skipif(OUTDATED, reason="the interpreter of Triton 3.6 fails with numpy 2.4 and newer")
def test_kernels_under_the_interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The processes see the variable before they define the kernels."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    in_group(in_float32, 2, tmp_path, 2, "triton")
