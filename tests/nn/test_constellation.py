"""Tests of ConstellationClassifier: logits, initial values, temperature, displacements."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gistops.nn import ConstellationClassifier, GistClassifier

from .samples import KINDS, B, D, K, M, batch, reference_logits, spread


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [0, 1, M])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_logits_are_those_of_the_definition(
    kind: type[ConstellationClassifier], m: int, backend: str | None, seed: int
) -> None:
    head = spread(kind(D, K, m, backend=backend))
    x = torch.randn(B, D) * 3
    expected = reference_logits(x, head.centers, head.displacements, head.raw_tau)
    logits = head(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=1e-5)
    again, slots = head(x, return_slots=True)
    assert torch.equal(logits, again)
    assert (slots.shape, slots.dtype) == ((B, K), torch.uint8)
    if m == 0:
        cosine = 1 / head.tau * logits
        torch.testing.assert_close(cosine, F.normalize(x) @ F.normalize(head.centers).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_initial_values_have_the_documented_distribution(dtype: torch.dtype, seed: int) -> None:
    d, classes = 256, 500
    head = GistClassifier(d, classes, 5, tau=9.0, displacement_scale=0.2, dtype=dtype)
    assert {p.dtype for p in head.parameters()} == {dtype}
    assert head.raw_tau.shape == head.raw_random_tau.shape == (1,)  # FSDP takes no scalars
    for centers in (head.centers, head.random_centers):
        values = centers.detach().double() * d**0.5  # standard normal
        assert abs(values.mean().item()) < 6 / values.numel() ** 0.5
        assert abs(values.std().item() - 1) < 6 / (2 * values.numel()) ** 0.5 + 1e-3
    assert not torch.equal(head.centers, head.random_centers)
    center = head.centers.detach().double().norm(dim=1).mean()
    torch.testing.assert_close(
        head.displacements.detach().double().norm(dim=1), (0.2 * center).expand(5), rtol=1e-2, atol=0
    )
    assert torch.linalg.matrix_rank(head.displacements.detach().double()) == 5
    for tau in (head.tau, head.random_tau):
        assert tau.shape == ()
        assert tau.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(tau.item(), 9.0, rtol=2e-2, atol=0)
    torch.testing.assert_close(GistClassifier(d, 3).tau.item(), 16.0)


def test_displacements_are_never_zero(seed: int) -> None:
    """In one dimension a normal draw may be near zero, but a normalized direction is not."""
    head = ConstellationClassifier(1, 1, 255)
    torch.testing.assert_close(head.displacements.abs(), (0.1 * head.centers.abs()).expand(255, 1))
    nn.init.zeros_(head.centers)
    bare = ConstellationClassifier(D, K, 0)
    nn.init.zeros_(bare.centers)
    bare.add_displacements()
    torch.testing.assert_close(bare.displacements.norm(dim=1), torch.full((4,), 0.1))


def test_tau_is_positive_and_learned(seed: int) -> None:
    head = spread(ConstellationClassifier(D, K))
    x, y = batch()
    loss = F.cross_entropy(head(x), y)
    loss.backward()
    assert head.raw_tau.grad is not None
    assert head.raw_tau.grad.item() != 0
    with torch.no_grad():
        head.raw_tau -= 50 * head.raw_tau.grad.sign()
    assert 0 < head.tau.item() < math.inf


def test_displacements_are_copied_from_values(seed: int) -> None:
    head = GistClassifier(D, K, 0)
    values = torch.randn(3, D)
    head.add_displacements(values=values)
    assert head.num_displacements == 3
    assert torch.equal(head.displacements, values)
    values.zero_()
    assert head.displacements.all()  # a copy
    with pytest.raises(
        RuntimeError, match="add_displacements: expected a head made with num_displacements=0"
    ):
        head.add_displacements()
