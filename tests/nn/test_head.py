"""Tests of MaxCosineHead: loss, prediction, frozen heads, sub-centers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gistops.nn import ConstellationClassifier, GistClassifier, MaxCosineHead, SubcenterClassifier

D, K, B = 40, 601, 37
Make = Callable[[], MaxCosineHead]
HEADS: list[Make] = [
    lambda: ConstellationClassifier(D, K, 3),
    lambda: ConstellationClassifier(D, K, 0),
    lambda: GistClassifier(D, K, 3),
    lambda: SubcenterClassifier(D, K, 3),
    lambda: ConstellationClassifier(D, K, 3, backend="reference"),
    lambda: ConstellationClassifier(D, K, 3, dtype=torch.bfloat16),
]
every_head = pytest.mark.parametrize("make", HEADS, ids=range(len(HEADS)))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(B, D), torch.randint(0, K, (B,))


@every_head
def test_loss_is_the_cross_entropy_of_the_logits(make: Make, seed: int) -> None:
    head, (x, y) = make(), batch()
    y[3] = -100
    weight, bias = torch.rand(K), torch.randn(K)
    options = {"weight": weight, "label_smoothing": 0.1}
    loss = head.loss(x, y, class_bias=bias, **options)
    expected = F.cross_entropy(head(x) + bias, y, **options)
    torch.testing.assert_close(loss, expected, atol=2e-5, rtol=2e-5)
    used = [p for name, p in head.named_parameters() if "random" not in name and p.requires_grad]
    for ours, true in zip(torch.autograd.grad(loss, used), torch.autograd.grad(expected, used), strict=True):
        # bfloat16 gradients are rounded to bfloat16
        torch.testing.assert_close(
            ours,
            true,
            atol=float(true.abs().max()) * (1e-2 if ours.dtype == torch.bfloat16 else 1e-4),
            rtol=0,
        )


@every_head
def test_predictions_are_those_of_the_logits(make: Make, seed: int) -> None:
    head, (x, _) = make(), batch()
    logits, slots = head(x, return_slots=True)
    bias = torch.randn(K)
    assert torch.equal(head.predict(x), logits.argmax(1))
    assert torch.equal(head.predict(x, class_bias=bias), (logits + bias).argmax(1))
    best = head.predict_topk(x, 5)
    classes = logits.sort(dim=1, descending=True, stable=True).indices[
        :, :5
    ]  # softmax may round to equal values
    torch.testing.assert_close(best.probabilities, logits.softmax(1).gather(1, classes))
    assert torch.equal(best.classes, classes)
    assert torch.equal(best.slots, slots.gather(1, classes))
    assert not best.probabilities.requires_grad


@every_head
def test_a_frozen_head_has_the_bits_of_the_head(make: Make, device: str, seed: int) -> None:
    head, (x, _) = make(), batch()
    with torch.no_grad():
        if head.centers.dim() == 2 and getattr(head, "num_displacements", 0):
            head.centers[7] = -head.displacements[1] * 1.001  # a cancelled pair (csrc/cpu/norms.h)
            head.centers[8] = -head.displacements[2]
    logits, slots = head(x, return_slots=True)
    best = head.predict_topk(x, 9)
    frozen = head.freeze()
    assert not frozen.training
    assert not list(frozen.parameters())
    assert all(p.requires_grad or not p.numel() for p in head.parameters()), "the head stays as it was"
    assert (frozen._norms is None) == (device != "cpu" or head.backend == "reference")
    frozen_logits, frozen_slots = frozen(x, return_slots=True)
    assert torch.equal(frozen_logits, logits)
    assert torch.equal(frozen_slots, slots)
    assert torch.equal(frozen(x), logits)
    for ours, before in zip(frozen.predict_topk(x, 9), best, strict=True):
        assert torch.equal(ours, before)
    y = torch.randint(0, K, (B,))
    assert torch.equal(frozen.loss(x, y, label_smoothing=0.1), head.loss(x, y, label_smoothing=0.1).detach())


def test_a_frozen_head_passes_the_gradient_of_its_input(seed: int) -> None:
    head, (x, _) = ConstellationClassifier(D, K, 3), batch()
    x.requires_grad_()
    (expected,) = torch.autograd.grad(head(x).square().sum(), x)
    (ours,) = torch.autograd.grad(head.freeze()(x).square().sum(), x)
    assert torch.equal(ours, expected)
    with pytest.warns(FutureWarning, match="freeze\\(\\) returns a copy"):
        assert head.unfreeze() is head


def test_one_subcenter_is_a_cosine_classifier(seed: int) -> None:
    head, plain = SubcenterClassifier(D, K, 1), ConstellationClassifier(D, K, 0)
    with torch.no_grad():
        plain.centers.copy_(head.centers[:, 0])
    x, _ = batch()
    torch.testing.assert_close(head(x), plain(x))
    assert repr(head) == f"SubcenterClassifier(in_features={D}, num_classes={K}, num_subcenters=1)"
    for bad, words in (({"num_subcenters": 0}, "num_subcenters: expected"), ({"tau": 0}, "tau: expected")):
        with pytest.raises(ValueError, match=words):
            SubcenterClassifier(D, K, **bad)


def test_int32_targets_give_the_losses_of_int64(seed: int) -> None:
    head, (x, y) = GistClassifier(D, K, 3), batch()
    for ours, expected in zip(head.losses(x, y.int(), x, y.int()), head.losses(x, y, x, y), strict=True):
        assert torch.equal(ours, expected)
