"""A tensor that is changed in-place between the forward and the backward makes the backward raise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gistops

from .oracle import Sample

B, K, D = 6, 12, 20
NAMES = ("input", "centers", "displacements", "tau", "target", "class_bias", "weight", "margin")
EXTRA: dict[str, tuple[str, ...]] = {"translation": (), "rotation": ("axis",), "mlp": ("mlp0", "mlp1")}


def arguments(transform: str, small: torch.dtype) -> dict[str, Tensor]:
    """Return all tensors of a loss by name; tau, bias and margin, and the tensors of a transform, in the dtype `small`."""
    input, centers, displacements, _ = Sample(B, K, D, 2).tensors(0)
    every = {
        "input": input, "centers": centers, "displacements": displacements, "tau": torch.tensor(8.0, dtype=small),
        "target": torch.arange(B, dtype=torch.int32), "class_bias": torch.zeros(K, dtype=small),
        "weight": torch.ones(K), "margin": torch.full((K,), 0.25, dtype=small),
    }  # fmt: skip
    shapes = {"axis": (D,), "mlp0": (3, 2 * D), "mlp1": (D, 3)}
    return every | {name: torch.randn(shapes[name], dtype=small) for name in EXTRA[transform]}


def loss_and_lse(
    tensors: dict[str, Tensor], transform: Any, kind: Any, smoothing: float, backend: str
) -> Any:
    given: dict[str, Any] = {name: x for name, x in tensors.items() if not name.startswith("mlp")}
    if transform == "mlp":
        given["mlp"] = (tensors["mlp0"], tensors["mlp1"])
    return gistops.constellation_cross_entropy(
        **given,
        transform=transform,
        margin_kind=kind,
        label_smoothing=smoothing,
        return_lse=True,
        backend=backend,
    )


@pytest.mark.parametrize("small", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["logit", "angle"])
@pytest.mark.parametrize("transform", EXTRA)
def test_every_argument_of_a_loss(
    transform: str, kind: str, small: torch.dtype, backend: str, seed: int
) -> None:
    for smoothing in (0.0, 0.1):
        for name in (*NAMES, *EXTRA[transform]):
            for output in range(2):
                tensors = arguments(transform, small)
                value = loss_and_lse(tensors, transform, kind, smoothing, backend)[output].sum()
                with torch.no_grad():
                    tensors[name].mul_(1)
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    value.backward()


def test_a_frozen_classifier_and_no_graph(backend: str, seed: int) -> None:
    """An unchanged tensor, and a change after the backward, raise nothing."""
    tensors = arguments("translation", torch.float32)
    for name in ("centers", "displacements"):
        tensors[name] = tensors[name].detach()
    loss, lse = loss_and_lse(tensors, "translation", "logit", 0.1, backend)
    (loss + lse.sum()).backward(retain_graph=True)
    (loss + lse.sum()).backward()
    tensors["margin"].mul_(2)
    with torch.no_grad():
        loss, _ = loss_and_lse(tensors, "translation", "logit", 0.1, backend)
    assert not loss.requires_grad


def test_the_loss_may_be_changed_in_place(backend: str, seed: int) -> None:
    """Training loops divide the loss in-place by the number of micro-batches."""
    tensors = arguments("translation", torch.bfloat16)
    plain, _ = loss_and_lse(tensors, "translation", "logit", 0.0, backend)
    (expected,) = torch.autograd.grad(plain / 4, tensors["input"])
    loss, lse = loss_and_lse(tensors, "translation", "logit", 0.0, backend)
    loss /= 4
    lse *= 2
    (gradient,) = torch.autograd.grad(loss, tensors["input"])
    torch.testing.assert_close(gradient, expected)
