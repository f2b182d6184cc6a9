"""The loss that is one node of the graph: the CPU's, without class bias, margin and label smoothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gistops

from .oracle import Sample, generator

pytestmark = pytest.mark.cpu
B, K, D, M = 70, 530, 90, 3
IGNORED = 7


def leaves(seed: int, dtype: torch.dtype, form: str = "translation") -> list[Tensor]:
    """Return input, centers, except for sub-centers displacements, tau, and for rotations the axis, rounded to float32."""
    x, w, delta, tau = (
        t.float().to(dtype) for t in Sample(B, K * M if form == "subcenters" else K, D, M).tensors(seed)
    )
    tensors = [x, w.view(K, M, D), tau] if form == "subcenters" else [x, w, delta, tau]
    if form == "rotation":
        tensors.append(torch.randn(D, generator=generator(seed)).to(dtype))
    return [t.detach().requires_grad_() for t in tensors]


def loss_and_lse(tensors: list[Tensor], backend: str, **options: Any) -> tuple[Tensor, Tensor]:
    loss: Any = gistops.subcenter_cross_entropy if len(tensors) == 3 else gistops.constellation_cross_entropy
    if len(tensors) == 5:
        options |= {"transform": "rotation", "axis": tensors[4]}
    outputs: tuple[Tensor, Tensor] = loss(*tensors[:4], **options, return_lse=True, backend=backend)
    return outputs


@pytest.mark.parametrize("form", ["translation", "subcenters", "rotation"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradients_of_either_output_and_of_both(reduction: str, weighted: bool, form: str, seed: int) -> None:
    torch.manual_seed(seed)
    target = torch.randint(K, (B,))
    target[::5] = IGNORED
    weight = torch.rand(K) if weighted else None
    options: dict[str, Any] = {"target": target, "reduction": reduction, "ignore_index": IGNORED}
    upstream = torch.rand(2, B, dtype=torch.float64)
    results = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        tensors = leaves(seed, dtype, form)
        weights = None if weight is None else weight.to(dtype)
        loss, lse = loss_and_lse(tensors, backend, weight=weights, **options)
        assert type(loss.grad_fn).__name__ == "_StashedLossBackward" or backend == "reference"
        by_loss, by_lse = (loss * upstream[0].to(dtype)).sum(), (lse * upstream[1].to(dtype)).sum()
        made = [loss, lse]
        for value in (by_loss, by_lse, by_loss + by_lse):  # the second and the third recompute the scores
            made += torch.autograd.grad(value, tensors, retain_graph=True)
        results.append(made)
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(
            ours.double(), truth, rtol=2e-4, atol=2e-5 * float(truth.abs().max().detach())
        )


def test_the_infinite_gradient_of_an_ignored_row(seed: int) -> None:
    """The root of a loss of 0 has an infinite gradient, which an ignored row must not pass on."""
    target = torch.arange(B)
    target[3] = IGNORED
    tensors = leaves(seed, torch.float32)
    loss, _ = loss_and_lse(tensors, "cpu", target=target, reduction="none", ignore_index=IGNORED)
    for gradient in torch.autograd.grad(loss.sqrt().sum(), tensors):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("form", ["translation", "rotation"])
def test_gradients_of_several_upstream_gradients(form: str, seed: int) -> None:
    tensors = leaves(seed, torch.float32, form)
    loss, _ = loss_and_lse(tensors, "cpu", target=torch.arange(B), reduction="none")
    rows = torch.eye(B)[:3]
    batched = torch.autograd.grad(loss, tensors, rows, is_grads_batched=True, retain_graph=True)
    for i, row in enumerate(rows):
        for all_rows, one in zip(
            batched, torch.autograd.grad(loss, tensors, row, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(all_rows[i], one)


@pytest.mark.parametrize("argument", [2, 4])
def test_in_place_changes_of_a_frozen_displacement_or_axis(argument: int, seed: int) -> None:
    tensors = leaves(seed, torch.float32, "rotation")
    tensors[argument] = tensors[argument].detach()
    loss, _ = loss_and_lse(tensors, "cpu", target=torch.arange(B))
    tensors[argument].mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
