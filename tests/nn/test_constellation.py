"""ConstellationClassifier and GistClassifier: values, initialisation, gradient routing, stages."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gistops.nn import ConstellationClassifier, GistClassifier

from .samples import KINDS, B, D, K, M, batch, reference_logits, spread


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [0, 1, M])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_logits_against_the_definition(
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
def test_initial_values(dtype: torch.dtype, seed: int) -> None:
    d, classes = 256, 500
    head = GistClassifier(d, classes, 5, tau=9.0, displacement_scale=0.2, dtype=dtype)
    assert {p.dtype for p in head.parameters()} == {dtype}
    assert head.raw_tau.shape == head.raw_random_tau.shape == (1,)  # FSDP takes no scalars
    for centers in (head.centers, head.random_centers):
        values = centers.detach().double() * d**0.5  # should be standard normal
        assert abs(values.mean().item()) < 6 / values.numel() ** 0.5
        assert abs(values.std().item() - 1) < 6 / (2 * values.numel()) ** 0.5 + 1e-3
    assert not torch.equal(head.centers, head.random_centers)
    centre = head.centers.detach().double().norm(dim=1).mean()
    torch.testing.assert_close(
        head.displacements.detach().double().norm(dim=1), (0.2 * centre).expand(5), rtol=1e-2, atol=0
    )
    assert torch.linalg.matrix_rank(head.displacements.detach().double()) == 5
    for tau in (head.tau, head.random_tau):
        assert tau.shape == ()
        assert tau.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(tau.item(), 9.0, rtol=2e-2, atol=0)
    torch.testing.assert_close(GistClassifier(d, 3).tau.item(), 16.0)


def test_displacements_are_never_zero(seed: int) -> None:
    """In one dimension a normal draw may come near zero; a direction does not."""
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


def gradients(head: GistClassifier, which: int) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    """Gradients of one loss alone, of ours and of the definition in float64."""
    (xb, yb), (xr, yr) = batch(), batch(size=B + 18)
    loss = head.losses(xb, yb, xr, yr)[which]
    loss.backward()
    ours = {name: p.grad for name, p in head.named_parameters()} | {
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
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    exact |= {"x_balanced": inputs[0], "x_random": inputs[1]}
    return ours, {name: p.grad for name, p in exact.items()}


@pytest.mark.parametrize("m", [0, M])
@pytest.mark.parametrize("which", [0, 1], ids=["balanced", "random"])
def test_each_loss_trains_its_own_parameters_and_no_other(which: int, m: int, seed: int) -> None:
    head = GistClassifier(D, K, m)
    spread(head)
    ours, expected = gradients(head, which)
    trained = (
        {"centers", "raw_tau", "x_balanced"},
        {"random_centers", "displacements", "raw_random_tau", "x_random"},
    )[which]
    assert {name for name, gradient in expected.items() if gradient is not None} == trained
    for name, gradient in ours.items():
        if name in trained:
            if name == "displacements" and not m:
                continue  # nothing to train
            assert gradient is not None, name
            assert gradient.any(), name
            torch.testing.assert_close(gradient.double(), expected[name], rtol=1e-3, atol=2e-6, msg=name)
        else:
            assert gradient is None or not gradient.any(), f"{name} must get nothing"


def test_blocked_gradients_stay_zero_beside_the_others(seed: int) -> None:
    """Both losses at once: bit for bit the sums of each alone, so that no stream leaks into the other."""
    head = GistClassifier(D, K)
    spread(head)
    (xb, yb), (xr, yr) = batch(), batch()
    parameters = list(head.parameters())
    balanced, random = head.losses(xb, yb, xr, yr)
    both = torch.autograd.grad(random + 0.5 * balanced, parameters)
    balanced, random = head.losses(xb, yb, xr, yr)
    alone_b = torch.autograd.grad(0.5 * balanced, parameters, allow_unused=True)
    alone_r = torch.autograd.grad(random, parameters, allow_unused=True)
    for total, b, r in zip(both, alone_b, alone_r, strict=True):
        assert (b is None) != (r is None)
        assert torch.equal(total, r if b is None else b)


def test_class_probabilities_as_targets(seed: int) -> None:
    head = spread(GistClassifier(D, K))
    (xb, yb), (xr, yr) = batch(), batch()
    hard = head.losses(xb, yb, xr, yr)
    soft = head.losses(xb, F.one_hot(yb, K).half(), xr, F.one_hot(yr, K).double())
    torch.testing.assert_close(soft, hard)


@pytest.mark.parametrize("cast", ["none", "bfloat16", "double", "frozen"])
def test_second_stage_keeps_the_first(cast: str, seed: int) -> None:
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
    assert (head(torch.ones(1, D)) >= before - 1e-4).all()  # more vectors, never a lower maximum
    other = GistClassifier(D, K, 0)
    other.load_state_dict({**head.state_dict(), "displacements": torch.empty(0, D)})
    other.add_displacements(6, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(other.displacements.to(new.dtype), new)


def test_displacements_from_values(seed: int) -> None:
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
