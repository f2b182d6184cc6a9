"""Tests of heads whose displacements rotate the centers or enter an MLP."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gistops.backends import reference
from gistops.nn import ConstellationClassifier, GistClassifier

from .samples import KINDS, B, D, K, batch, spread

TRANSFORMS = {"rotation": ["axis"], "mlp": ["mlp_in", "mlp_out"]}


def by_definition(head: ConstellationClassifier, x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute logits and slots in float64 by the reference."""
    w, delta, tau = head.centers.double(), head.displacements.double(), head.tau.double()
    if head.transform == "rotation":
        return reference.rotated_logits(x.double(), w, delta, head.axis.double(), tau)
    return reference.mlp_logits(x.double(), w, delta, (head.mlp_in.double(), head.mlp_out.double()), tau)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_every_result_is_that_of_the_definition(
    transform: Any, kind: type[ConstellationClassifier], backend: str | None, seed: int
) -> None:
    head = spread(kind(D, K, transform=transform, backend=backend))
    x, y = batch()
    expected, slots = by_definition(head, x)
    logits, won = head(x, return_slots=True)
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=1e-5)
    assert (won == slots).float().mean() > 0.999
    assert len(won.unique()) == 5, "a slot wins nowhere, so that the test is weak"
    torch.testing.assert_close(head.loss(x, y).double(), F.cross_entropy(expected, y), atol=1e-4, rtol=1e-5)
    predicted = expected.gather(1, head.predict(x)[:, None])[:, 0]  # two classes may be equal up to rounding
    torch.testing.assert_close(predicted, expected.amax(1), atol=1e-4, rtol=1e-5)
    best = head.predict_topk(x, 3)
    torch.testing.assert_close(
        best.probabilities.double(), expected.softmax(1).topk(3).values, atol=1e-4, rtol=1e-4
    )
    frozen = copy.deepcopy(head).freeze()
    assert torch.equal(frozen(x), logits)
    assert torch.equal(frozen.predict(x), head.predict(x))
    assert repr(transform) in repr(head)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_each_loss_trains_its_own_parameters_and_no_other(transform: Any, seed: int) -> None:
    head = spread(GistClassifier(D, K, transform=transform))
    streams = (*batch(), *batch())
    shared = {"displacements", *TRANSFORMS[transform]}
    trained = ({"centers", "raw_tau"}, {"random_centers", "raw_random_tau"} | shared)
    for which, expected in enumerate(trained):
        head.zero_grad()
        head.losses(*streams)[which].backward()
        got = {name for name, p in head.named_parameters() if p.grad is not None and p.grad.any()}
        assert got == expected
    random = F.cross_entropy(head.random_logits(streams[2]), streams[3])
    torch.testing.assert_close(head.losses(*streams)[1], random)
    probabilities = torch.randn(B, K).softmax(1)
    balanced, _ = head.losses(streams[0], probabilities, *streams[2:])
    torch.testing.assert_close(balanced, F.cross_entropy(head(streams[0]), probabilities))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_second_stage_adds_the_parameters_of_the_transform(transform: Any, seed: int) -> None:
    head = GistClassifier(D, K, 0, transform=transform)
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    assert not set(before) & set(TRANSFORMS[transform])
    assert torch.equal(head(torch.ones(2, D)), GistClassifier.forward(copy.deepcopy(head), torch.ones(2, D)))
    head.add_displacements(3, generator=torch.Generator().manual_seed(seed))
    for name, value in before.items():
        assert name == "displacements" or torch.equal(getattr(head, name), value)
    again = GistClassifier(D, K, 0, transform=transform)
    again.load_state_dict(before)
    again.add_displacements(3, generator=torch.Generator().manual_seed(seed))
    for name, parameter in head.named_parameters():
        assert parameter.requires_grad
        assert torch.equal(again.get_parameter(name), parameter)
    whole = GistClassifier(D, K, 3, transform=transform)
    whole.load_state_dict(head.state_dict())
    x = batch()[0]
    assert torch.equal(whole(x), head(x))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_export_keeps_the_transform(transform: Any, seed: int) -> None:
    head = spread(
        GistClassifier(D, K, transform=transform, hidden_features=7 if transform == "mlp" else None)
    )
    exported = head.export()
    assert type(exported) is ConstellationClassifier
    x = batch()[0]
    assert torch.equal(exported(x), head(x))
    names = {name for name, _ in exported.named_parameters()}
    assert names == {"centers", "displacements", "raw_tau", *TRANSFORMS[transform]}
    assert not any(p is q for p in exported.parameters() for q in head.parameters())


def test_an_mlp_starts_at_displacement_scale(seed: int) -> None:
    """An MLP moves a center by about displacement_scale times its norm."""
    head = ConstellationClassifier(256, 300, 4, transform="mlp", displacement_scale=0.2, hidden_features=64)
    with torch.no_grad():
        w, delta = head.centers, head.displacements
        inputs = torch.cat([F.normalize(w, dim=1)[:, None].expand(-1, 4, -1), delta.expand(300, -1, -1)], 2)
        moved = ((inputs @ head.mlp_in.T).relu() @ head.mlp_out.T).norm(dim=2) / w.norm(dim=1, keepdim=True)
        assert 0.1 < moved.mean() < 0.4
        assert (moved > 0).all()
    assert head.mlp_in.shape == (64, 512)
    assert ConstellationClassifier(256, 3, transform="mlp").hidden_features == 64
    assert ConstellationClassifier(2, 3, transform="mlp").mlp_out.shape == (2, 1)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_training_lowers_the_loss(transform: Any, seed: int) -> None:
    head = GistClassifier(D, 12, 3, transform=transform)
    means = 2 * torch.randn(12, D)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(60):
        y = torch.randint(12, (2, B))
        x = means[y] + torch.randn(2, B, D)
        balanced, random = head.losses(x[0], y[0], x[1], y[1])
        optimizer.zero_grad()
        (random + 0.5 * balanced).backward()
        optimizer.step()
        losses.append(balanced.item())
    assert losses[-1] < 0.5 * losses[0]


def test_bad_arguments_raise() -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        (
            {"transform": "shift"},
            ValueError,
            "transform: expected one of 'translation', 'rotation', 'mlp', got 'shift'",
        ),
        ({"hidden_features": 8}, ValueError, "hidden_features: expected None unless transform='mlp'"),
        (
            {"transform": "mlp", "hidden_features": 0},
            ValueError,
            "hidden_features: expected an integer of at least 1",
        ),
    ]
    for change, kind, words in cases:
        with pytest.raises(kind, match=words):
            ConstellationClassifier(D, K, **change)
