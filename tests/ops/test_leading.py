"""Tests of leading dimensions: input [..., d] gives what its rows [B, d] give, in the shape of input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gistops
from gistops.nn import ConstellationClassifier, GistClassifier, MaxCosineHead, SubcenterClassifier

D, K = 12, 29
LEADING = [(), (5,), (3, 4), (2, 3, 4), (0,), (2, 0, 3), (1, 1)]


def make_head(kind: str, backend: str) -> MaxCosineHead:
    if kind == "subcenters":
        return SubcenterClassifier(D, K, backend=backend)
    return ConstellationClassifier(D, K, 3, transform=kind, backend=backend)  # type: ignore[arg-type]


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("kind", ["translation", "rotation", "mlp", "subcenters"])
def test_results_have_the_leading_dimensions_of_the_input(
    kind: str, leading: tuple[int, ...], backend: str, seed: int
) -> None:
    head = make_head(kind, backend)
    x, y = torch.randn(*leading, D), torch.randint(K, leading)
    rows, row_targets = x.reshape(y.numel(), D), y.reshape(-1)
    for module in (head, head.freeze()):
        logits, slots = module(x, return_slots=True)
        row_logits, row_slots = module(rows, return_slots=True)
        assert logits.shape == slots.shape == (*leading, K)
        assert torch.equal(logits.reshape(row_logits.shape), row_logits)
        assert torch.equal(slots.reshape(row_slots.shape), row_slots)
        assert torch.equal(module.predict(x), module.predict(rows).reshape(leading))
        for ours, expected in zip(module.predict_topk(x, 4), module.predict_topk(rows, 4), strict=True):
            assert torch.equal(ours, expected.reshape(*leading, 4))
        for options in ({}, {"label_smoothing": 0.1, "margin": 0.2, "class_bias": torch.randn(K)}):
            for reduction in ("none", "sum", "mean"):
                all_options: dict[str, Any] = {**options, "reduction": reduction, "return_lse": True}
                loss, lse = module.loss(x, y, **all_options)
                row_loss, row_lse = module.loss(rows, row_targets, **all_options)
                assert loss.shape == (leading if reduction == "none" else ())
                assert lse.shape == leading
                torch.testing.assert_close(loss.reshape(row_loss.shape), row_loss, equal_nan=True)
                torch.testing.assert_close(lse.reshape(row_lse.shape), row_lse)


def test_losses_are_those_of_class_last_logits(fused: str, seed: int) -> None:
    x, y = torch.randn(3, 4, D, requires_grad=True), torch.randint(K, (3, 4))
    w, delta = torch.randn(K, D), torch.randn(2, D)
    y[1, 2] = -100
    logits = gistops.constellation_logits(x, w, delta, 16.0, backend=fused)
    for reduction in ("none", "mean", "sum"):
        loss = gistops.constellation_cross_entropy(x, w, delta, 16.0, y, reduction=reduction, backend=fused)
        expected = F.cross_entropy(logits.movedim(-1, 1), y, reduction=reduction)
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        (expected_grad,) = torch.autograd.grad(expected.sum(), x, retain_graph=True)
        torch.testing.assert_close(grad, expected_grad, atol=1e-4, rtol=1e-4)


def test_two_streams_and_slot_usage_take_leading_dimensions(seed: int) -> None:
    head = GistClassifier(D, K, 3)
    x, y = torch.randn(3, 4, D), torch.randint(K, (3, 4))
    expected = head.losses(x.flatten(0, 1), y.flatten(), x.flatten(0, 1), y.flatten())
    torch.testing.assert_close(head.losses(x, y, x, y), expected)
    one_hot = F.one_hot(y, K).float()
    torch.testing.assert_close(head.losses(x, one_hot, x, one_hot), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(head.slot_usage(x, y), head.slot_usage(x.flatten(0, 1), y.flatten()))
    assert head.slot_usage(x[0, 0]).sum() == 1
    with pytest.raises(ValueError, match=r"y_balanced: expected int64 or int32 \[3, 4\] or .* \[3, 4, 29\]"):
        head.losses(x, y[0], x, y)


def test_shapes_of_targets_are_checked(seed: int) -> None:
    w, delta, x = torch.randn(K, D), torch.randn(2, D), torch.randn(3, 4, D)
    with pytest.raises(ValueError, match=r"target: expected shape \[3, 4\], got \[12\]"):
        gistops.constellation_cross_entropy(x, w, delta, 16.0, torch.zeros(12, dtype=torch.int64))


@pytest.mark.cpu  # a device-side assertion makes the GPU unusable for the process
def test_positions_of_targets_are_named(seed: int) -> None:
    w, delta, x = torch.randn(K, D), torch.randn(2, D), torch.randn(3, 4, D)
    y = torch.zeros(3, 4, dtype=torch.int64)
    y[2, 1] = K
    with pytest.raises(IndexError, match=r"got 29 at position 2, 1"):
        gistops.constellation_cross_entropy(x, w, delta, 16.0, y)
    y = torch.tensor(-1)
    with pytest.raises(IndexError, match=r"got -1 at position"):
        gistops.constellation_cross_entropy(x[0, 0], w, delta, 16.0, y)


def test_a_compiled_head_takes_any_leading_dimensions(seed: int) -> None:
    head = ConstellationClassifier(D, K, 3)
    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager", dynamic=True)
    for leading in ((3, 4), (5, 2), (7, 9), (2, 3, 4)):
        x = torch.randn(*leading, D)
        torch.testing.assert_close(compiled(x), head(x))
