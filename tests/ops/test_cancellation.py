"""Losses of centers that a displacement cancels, w_k close to -δ_j, on every path to the gradients.

There the sums of the fused form lose all digits, so that the kernels must compute these pairs from w_k + δ_j.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gistops

from .oracle import generator, scores

#: |w + δ| / |w| of the cancelled pairs.
CLOSENESS = [1e-3, 1e-5, 1e-6, 1e-7, 0.0]
#: Path -> rows and dimensions. On the CPU all rows, none or 256 of the rows fit into the memory that keeps scores.
SHAPES = {"stashed": (37, 64), "recomputed": (70, 24), "partly stashed": (300, 350)}
EPS = torch.finfo(torch.float32).eps


def sample(B: int, d: int, closeness: float, seed: int) -> tuple[list[Tensor], Tensor]:
    """Return input, centers, displacements, tau and target; slot 2 of most classes cancels."""
    source = generator(seed)
    K, m = 101, 3
    w, delta = torch.randn(K, d, generator=source), torch.randn(m, d, generator=source)
    w[7:90] = closeness * w[7:90] - delta[1]
    x = torch.randn(2 * B, d, generator=source)
    best = scores(x.double(), w.double(), delta.double()).topk(2, dim=2).values
    clear = (best[..., 0] - best[..., 1]).amin(1) > 1e-5  # rounding must not decide which slot wins
    x = x[clear][:B].contiguous()
    assert len(x) == B
    target = torch.randint(0, K, (B,), generator=source)
    target[0] = 8
    return [x, w, delta, torch.tensor(12.0)], target


def truth(tensors: list[Tensor], target: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return loss, gradients and error bounds from float64.

    A gradient is a sum over pairs (i, k). A bound is a few roundings of the sizes of its terms, times the factor 1 + τ
    by which the softmax increases the rounding of a logit.
    """
    wide = [t.double().requires_grad_() for t in tensors]
    x, w, delta, tau = wide
    every = scores(x, w, delta)
    cosines, slots = every.max(2)
    logits = tau * cosines
    loss = F.cross_entropy(logits, target, reduction="sum")
    gradients = list(torch.autograd.grad(loss, wide))
    with torch.no_grad():
        G = (logits.softmax(1) - F.one_hot(target, len(w))).abs() + EPS
        norms = (w[:, None] + F.pad(delta, (0, 0, 1, 0))).norm(dim=2).clamp(min=1e-12)  # [K, M]
        routed = tau * G / norms.expand(len(x), -1, -1).gather(2, slots[..., None])[..., 0]
        by_slot = [(routed * (slots == j)).sum() for j in range(1, len(delta) + 1)]
        terms = [
            (tau * G).sum(1)[:, None] / x.norm(dim=1, keepdim=True),
            routed.sum(0)[:, None],
            torch.stack(by_slot)[:, None],
            (G * logits.abs()).sum() / tau,
        ]
    return loss.detach(), gradients, [8 * EPS * (1 + float(tau.detach())) * t for t in terms]


def assert_close(found: Sequence[Tensor | None], tensors: list[Tensor], target: Tensor) -> None:
    loss, gradients, bounds = truth(tensors, target)
    assert found[0] is not None
    torch.testing.assert_close(found[0].detach().double(), loss, atol=0.0, rtol=1e-5)
    for name, value, true, bound in zip(
        ("input", "centers", "displacements", "tau"), found[1:], gradients, bounds, strict=True
    ):
        if value is not None:
            # A slot that wins nowhere has the bound 0, and the gradient 0.
            excess = (value.double() - true).abs() - bound
            assert (excess <= 0).all(), (
                f"gradient of {name}: its error is {float(excess.max()):.3g} above the bound"
            )


def loss_of(tensors: list[Tensor], target: Tensor, backend: str) -> Tensor:
    loss: Any = gistops.constellation_cross_entropy(*tensors, target, reduction="sum", backend=backend)
    return loss


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("closeness", CLOSENESS)
def test_loss_and_gradients(closeness: float, shape: str, fused: str, seed: int) -> None:
    tensors, target = sample(*SHAPES[shape], closeness, seed)
    leaves = [t.clone().requires_grad_() for t in tensors]
    loss = loss_of(leaves, target, fused)
    for _ in range(2):  # the second backward recomputes scores that the first has overwritten
        gradients = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert_close([loss, *gradients], tensors, target)


@pytest.mark.parametrize("closeness", CLOSENESS)
def test_gradients_beside_frozen_tensors(closeness: float, fused: str, seed: int) -> None:
    tensors, target = sample(37, 64, closeness, seed)
    for frozen in (1, 2):
        leaves = [t.clone().requires_grad_(i != frozen) for i, t in enumerate(tensors)]
        loss = loss_of(leaves, target, fused)
        learned = [t for t in leaves if t.requires_grad]
        gradients: list[Tensor | None] = list(torch.autograd.grad(loss, learned))
        gradients.insert(frozen, None)
        assert_close([loss, *gradients], tensors, target)


def test_gradients_in_a_compiled_graph(fused: str, seed: int) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for closeness in (1e-6, 0.0):
        tensors, target = sample(37, 64, closeness, seed)
        leaves = [t.clone().requires_grad_() for t in tensors]
        loss = compiled(leaves, target, fused)
        assert_close([loss, *torch.autograd.grad(loss, leaves)], tensors, target)


def test_gradients_of_subcenters_of_any_length(fused: str, seed: int) -> None:
    """Sub-centers need no sums: the vectors w_k + δ_j as sub-centers have the same loss."""
    for closeness in CLOSENESS:
        tensors, target = sample(37, 24, closeness, seed)
        x, w, delta, tau = tensors
        vectors = w[:, None] + F.pad(delta, (0, 0, 1, 0))
        leaves = [t.clone().requires_grad_() for t in (x, vectors, tau)]
        loss = gistops.subcenter_cross_entropy(*leaves, target, reduction="sum", backend=fused)
        assert isinstance(loss, Tensor)
        grad_input, grad, grad_tau = torch.autograd.grad(loss, leaves)
        found = [loss, grad_input, grad.double().sum(1), grad.double()[:, 1:].sum(0), grad_tau]
        assert_close(found, tensors, target)


def test_gradients_of_two_classes(fused: str) -> None:
    """The smallest case: the pair of class 0 and the displacement cancels to a millionth."""
    delta = torch.tensor([[0.3, 1.7]])
    w = torch.tensor([[-0.3 * (1 + 1e-6), -1.7], [1.0, 0.0]])
    x = torch.tensor([[1.0, 2.0], [1.0, -1.0]], requires_grad=True)
    loss = loss_of([x, w, delta, torch.tensor(16.0)], torch.tensor([0, 1]), fused)
    (gradient,) = torch.autograd.grad(loss, x)
    wide = x.detach().double().requires_grad_()
    expected = loss_of(
        [wide, w.double(), delta.double(), torch.tensor(16.0).double()], torch.tensor([0, 1]), "reference"
    )
    (true,) = torch.autograd.grad(expected, wide)
    torch.testing.assert_close(gradient.double(), true, atol=1e-4, rtol=1e-5)
