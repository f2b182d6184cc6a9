"""Tests of GistClassifier: routing of the gradients, class probabilities, the second stage."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gistops.nn import GistClassifier

from .samples import B, D, K, M, batch, reference_logits, spread


def gradients(head: GistClassifier, which: int) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    """Return the gradients of one loss of a float64 head, and those of the definition.

    In float32, two slots may be equal up to rounding and the gradients go to different ones.
    """
    (xb, yb), (xr, yr) = batch(), batch(size=B + 18)
    xb, xr = (x.detach().double().requires_grad_() for x in (xb, xr))
    loss = head.losses(xb, yb, xr, yr)[which]
    loss.backward()
    got = {name: p.grad for name, p in head.named_parameters()} | {
        "x_balanced": xb.grad,
        "x_random": xr.grad,
    }
    exact = {n: p.detach().double().requires_grad_() for n, p in head.named_parameters()}
    inputs = [x.detach().double().requires_grad_() for x in (xb, xr)]
    if which == 0:
        logits = reference_logits(
            inputs[0], exact["centers"], exact["displacements"].detach(), exact["raw_tau"]
        )
    else:
        logits = reference_logits(
            inputs[1], exact["random_centers"], exact["displacements"], exact["raw_random_tau"]
        )
    expected = F.cross_entropy(logits, yr if which else yb)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    exact |= {"x_balanced": inputs[0], "x_random": inputs[1]}
    return got, {name: p.grad for name, p in exact.items()}


@pytest.mark.parametrize("m", [0, M])
@pytest.mark.parametrize("which", [0, 1], ids=["balanced", "random"])
def test_each_loss_trains_its_own_parameters_and_no_other(which: int, m: int, seed: int) -> None:
    head = spread(GistClassifier(D, K, m, dtype=torch.float64))
    got, expected = gradients(head, which)
    trained = (
        {"centers", "raw_tau", "x_balanced"},
        {"random_centers", "displacements", "raw_random_tau", "x_random"},
    )[which]
    assert {name for name, gradient in expected.items() if gradient is not None} == trained
    for name, gradient in got.items():
        if name in trained:
            if name == "displacements" and not m:
                continue  # empty
            assert gradient is not None, name
            assert gradient.any(), name
            torch.testing.assert_close(gradient, expected[name], msg=name)
        else:
            assert gradient is None or not gradient.any(), f"{name} must get no gradient"


def test_no_gradient_leaks_between_the_streams(seed: int) -> None:
    """The gradients of both losses together are bit for bit those of each loss alone."""
    head = GistClassifier(D, K)
    spread(head)
    (xb, yb), (xr, yr) = batch(), batch()
    parameters = list(head.parameters())
    balanced, random = head.losses(xb, yb, xr, yr)
    together = torch.autograd.grad(random + 0.5 * balanced, parameters)
    balanced, random = head.losses(xb, yb, xr, yr)
    alone_b = torch.autograd.grad(0.5 * balanced, parameters, allow_unused=True)
    alone_r = torch.autograd.grad(random, parameters, allow_unused=True)
    for total, b, r in zip(together, alone_b, alone_r, strict=True):
        assert (b is None) != (r is None)
        assert torch.equal(total, r if b is None else b)


def test_one_hot_probabilities_give_the_loss_of_class_indices(seed: int) -> None:
    head = spread(GistClassifier(D, K))
    (xb, yb), (xr, yr) = batch(), batch()
    hard = head.losses(xb, yb, xr, yr)
    soft = head.losses(xb, F.one_hot(yb, K).half(), xr, F.one_hot(yr, K).double())
    torch.testing.assert_close(soft, hard)


@pytest.mark.parametrize("cast", ["none", "bfloat16", "double", "frozen"])
def test_second_stage_keeps_the_parameters_of_the_first(cast: str, seed: int) -> None:
    head = GistClassifier(D, K, 0)
    spread(head)
    head = {
        "bfloat16": head.bfloat16,
        "double": head.double,
        "frozen": lambda: head.requires_grad_(False),
    }.get(cast, lambda: head)()
    kept = {name: p for name, p in head.named_parameters() if name != "displacements"}
    values = {name: p.detach().clone() for name, p in kept.items()}
    before = head(torch.ones(1, D))
    head.add_displacements(6, generator=torch.Generator().manual_seed(seed))
    assert head.num_displacements == 6
    assert "num_displacements=6" in repr(head)
    for name, p in kept.items():
        assert getattr(head, name) is p
        assert torch.equal(p, values[name])
    new = head.displacements
    assert isinstance(new, nn.Parameter)
    assert (new.dtype, new.requires_grad) == (head.centers.dtype, True)
    norm = 0.1 * head.centers.detach().double().norm(dim=1).mean()
    torch.testing.assert_close(new.detach().double().norm(dim=1), norm.expand(6), rtol=1e-2, atol=0)
    assert (head(torch.ones(1, D)) >= before - 1e-4).all()  # a maximum over more vectors is never lower
    other = GistClassifier(D, K, 0)
    other.load_state_dict({**head.state_dict(), "displacements": torch.empty(0, D)})
    other.add_displacements(6, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(other.displacements.to(new.dtype), new)


@pytest.mark.parametrize("probabilities", [False, True])
def test_a_bias_of_the_balanced_loss(probabilities: bool, seed: int) -> None:
    head, (x, y) = spread(GistClassifier(D, K, M, dtype=torch.float64)), batch()
    x, bias = x.detach().double(), torch.randn(K, dtype=torch.float64)
    target = torch.rand(len(x), K, dtype=torch.float64).softmax(1) if probabilities else y
    balanced, random = head.losses(x, target, x, y, balanced_bias=bias)
    logits = reference_logits(x, head.centers, head.displacements, head.raw_tau)
    torch.testing.assert_close(balanced, F.cross_entropy(logits + bias, target))
    torch.testing.assert_close(random, head.losses(x, y, x, y)[1])
    balanced.backward()
    assert head.displacements.grad is None
    assert head.random_centers.grad is None
    with pytest.raises(ValueError, match=rf"balanced_bias: expected shape \[{K}\].*got \[1\]"):
        head.losses(x, target, x, y, balanced_bias=bias[:1])


def test_smoothed_labels_are_those_of_pytorch(seed: int) -> None:
    head = spread(GistClassifier(D, K, M, dtype=torch.float64))
    (xb, yb), (xr, yr) = batch(), batch(size=B + 18)
    xb, xr = xb.detach().double(), xr.detach().double()
    tensors = [tensor.detach() for tensor in (head.centers, head.displacements, head.raw_tau)]
    random = [tensor.detach() for tensor in (head.random_centers, head.displacements, head.raw_random_tau)]
    expected = [
        F.cross_entropy(reference_logits(xb, *tensors), yb, label_smoothing=0.3),
        F.cross_entropy(reference_logits(xr, *random), yr, label_smoothing=0.3),
    ]
    for targets in ((yb, yr), (F.one_hot(yb, K).double(), F.one_hot(yr, K).double())):
        losses = head.losses(xb, targets[0], xr, targets[1], label_smoothing=0.3)
        torch.testing.assert_close([loss.detach() for loss in losses], expected)
