"""ConstellationClassifier and GistClassifier: values, initialisation, routing, stages, slot usage, errors."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gistops.backends import reference
from gistops.nn import ConstellationClassifier, GistClassifier, SlotUsage

D, K, M, B = 41, 67, 4, 53


def reference_logits(input: Tensor, centers: Tensor, displacements: Tensor, log_tau: Tensor) -> Tensor:
    """The definition in float64."""
    return reference.constellation_logits(
        input.double(), centers.double(), displacements.double(), log_tau.double().exp()
    )[0]


def spread(head: ConstellationClassifier) -> ConstellationClassifier:
    """Displacements as long as centres, and temperatures that differ, so that every slot and stream tells."""
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name == "displacements":
                parameter.copy_(torch.randn_like(parameter) * 0.8 * D**-0.5)
            elif "log" in name:
                parameter.copy_(torch.rand_like(parameter) + 2)
    return head


def batch(classes: int = K, size: int = B) -> tuple[Tensor, Tensor]:
    return torch.randn(size, D, requires_grad=True), torch.randint(classes, (size,))


@pytest.mark.parametrize("kind", [ConstellationClassifier, GistClassifier])
@pytest.mark.parametrize("m", [0, 1, M])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_logits_against_the_definition(
    kind: type[ConstellationClassifier], m: int, backend: str | None, seed: int
) -> None:
    head = spread(kind(D, K, m, backend=backend))
    x = torch.randn(B, D) * 3
    expected = reference_logits(x, head.centers, head.displacements, head.log_tau)
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
    assert head.log_tau.grad is not None
    assert head.log_tau.grad.item() != 0
    with torch.no_grad():
        head.log_tau -= 50 * head.log_tau.grad.sign()
    assert 0 < head.tau.item() < math.inf


def gradients(head: GistClassifier, which: int) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    """Gradients of one loss alone, of ours and of the definition in float64."""
    torch.manual_seed(torch.initial_seed())
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
            inputs[0], exact["centers"], exact["displacements"].detach(), exact["log_tau"]
        )
    else:
        logits = reference_logits(
            inputs[1], exact["random_centers"], exact["displacements"], exact["log_random_tau"]
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
        {"centers", "log_tau", "x_balanced"},
        {"random_centers", "displacements", "log_random_tau", "x_random"},
    )[which]
    assert {name for name, gradient in expected.items() if gradient is not None} == trained
    for name, gradient in ours.items():
        if name in trained:
            assert gradient is not None, name
            assert gradient.any() or not gradient.numel(), name
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
    assert (new.dtype, new.requires_grad) == (head.centers.dtype, cast != "frozen")
    norm = 0.1 * head.centers.detach().double().norm(dim=1).mean()
    torch.testing.assert_close(new.detach().double().norm(dim=1), norm.expand(6), rtol=1e-2, atol=0)
    assert (head(torch.ones(1, D)) >= before - 1e-4).all()  # more vectors, never a lower maximum
    other = GistClassifier(D, K, 0)
    other.load_state_dict({**head.state_dict(), "displacements": torch.empty(0, D)})
    other.add_displacements(6, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(other.displacements.to(new.dtype), new)


def test_displacements_from_values(seed: int) -> None:
    head = GistClassifier(D, K, 0)
    values = torch.randn(3, D, dtype=torch.float64)
    head.add_displacements(values=values)
    assert head.num_displacements == 3
    assert torch.equal(head.displacements, values.float())
    values.zero_()
    assert head.displacements.all()  # a copy
    with pytest.raises(
        RuntimeError, match="add_displacements: expected a head made with num_displacements=0"
    ):
        head.add_displacements()


@pytest.mark.parametrize("kind", [ConstellationClassifier, GistClassifier])
def test_slot_usage(kind: type[ConstellationClassifier], seed: int) -> None:
    head = spread(kind(D, K))
    x, y = batch(size=700)
    cosine = torch.einsum(
        "bd,bjd->bj",
        x.double(),
        F.normalize(
            head.centers.double()[y][:, None] + F.pad(head.displacements.double(), (0, 0, 1, 0)), dim=2
        ),
    )
    expected = cosine.argmax(dim=1).bincount(minlength=M + 1) / 700
    shares = head.slot_usage(x, y)
    assert (shares.shape, shares.dtype, shares.requires_grad) == ((M + 1,), torch.float32, False)
    torch.testing.assert_close(shares, expected.float(), atol=1.5 / 700, rtol=0)
    usage = SlotUsage(head)
    usage.update(x[:123], y[:123].int())
    logits, slots = head(x[123:], return_slots=True)
    usage.update_slots(slots, y[123:])
    assert torch.equal(usage.shares(), shares)
    assert usage.counts.sum() == 700
    predicted = head(x).argmax(dim=1)
    assert torch.equal(head.slot_usage(x), head.slot_usage(x, predicted))
    assert not torch.equal(head.slot_usage(x), shares)
    assert logits.shape == (577, K)


def test_warns_once_of_zero_displacements(seed: int) -> None:
    (xb, yb), (xr, yr) = batch(), batch()
    head = GistClassifier(D, K)
    nn.init.zeros_(head.displacements)
    with pytest.warns(RuntimeWarning, match=r"displacements are exactly zero: .* Give them other values"):
        head.losses(xb, yb, xr, yr)
    with pytest.warns(RuntimeWarning, match="GistClassifier: displacements are exactly zero"):
        GistClassifier(D, K, 0).add_displacements(values=torch.zeros(2, D))
    plain = ConstellationClassifier(D, K)
    nn.init.zeros_(plain.displacements)
    with pytest.warns(RuntimeWarning, match="ConstellationClassifier: displacements are exactly zero"):
        plain.slot_usage(xb)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head.losses(xb, yb, xr, yr)
        head.slot_usage(*batch(size=600))
        plain.slot_usage(*batch(size=600))


def test_warns_once_of_unused_displacements(seed: int) -> None:
    x, y = batch(size=600)
    away = GistClassifier(D, K)
    with torch.no_grad():  # every displacement points away from every feature
        x = x.abs()
        away.displacements.copy_(-away.displacements.abs() - 0.2)
    with pytest.warns(
        RuntimeWarning, match=r"slot 0, the bare centre, won all of 600 samples\. Start .*=0\.$"
    ):
        assert away.slot_usage(x, y).tolist() == [1, 0, 0, 0, 0]
    some = ConstellationClassifier(D, K)
    with torch.no_grad():
        some.displacements[[0, 2]] = away.displacements[[0, 2]]
        some.displacements[[1, 3]] *= 5
    with pytest.warns(RuntimeWarning, match=r"slots 1, 3 won none of 600 samples\. .*=2\.$"):
        some.slot_usage(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        away.slot_usage(x, y)
        some.slot_usage(x, y)
        few = GistClassifier(D, K)
        few.load_state_dict(away.state_dict())
        few.slot_usage(x[:499], y[:499])  # too few to tell
        spread(GistClassifier(D, K)).slot_usage(*batch(size=3000))
        GistClassifier(D, K, 0).slot_usage(*batch(size=3000))


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"in_features": 0}, ValueError, "in_features: expected an integer of at least 1, got 0"),
    ({"num_classes": 2.5}, TypeError, "num_classes: expected an integer .* got 2.5 of type float"),
    ({"num_displacements": 256}, ValueError, "num_displacements: expected an integer from 0 to 255, got 256"),
    ({"num_displacements": None}, TypeError, "num_displacements: .* got None of type NoneType"),
    ({"tau": 0}, ValueError, "tau: expected a finite number above 0, got 0.0"),
    ({"tau": math.nan}, ValueError, "tau: expected a finite number above 0, got nan"),
    ({"tau": "16"}, TypeError, "tau: expected a number above 0, got '16' of type str"),
    (
        {"displacement_scale": 0.0},
        ValueError,
        "displacement_scale: expected a finite number above 0, got 0.0",
    ),
    ({"dtype": torch.int64}, TypeError, "dtype: expected float32, .* got torch.int64"),
    ({"backend": "fast"}, ValueError, "backend: expected None or one of 'cpu', .* got 'fast'"),
]


@pytest.mark.parametrize("kind", [ConstellationClassifier, GistClassifier])
@pytest.mark.parametrize(("bad", "error", "words"), BAD, ids=[str(b[0]) for b in BAD])
def test_bad_arguments(
    kind: type[nn.Module], bad: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=f"^{words}$"):
        kind(**{"in_features": D, "num_classes": K, **bad})


def test_bad_calls(seed: int) -> None:
    head = GistClassifier(D, K, 0)
    (x, y), (xr, yr) = batch(), batch()
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: head(x[:, 1:]), ValueError, rf"centers: expected shape \[K, {D - 1}\]"),
        (lambda: head.losses(x, y[1:], xr, yr), ValueError, rf"y_balanced: .* got int64 \[{B - 1}\]"),
        (
            lambda: head.losses(x, y, xr, yr.int()),
            ValueError,
            rf"y_random: expected int64 \[{B}\] or .* int32",
        ),
        (lambda: head.losses(x, y, xr, yr.float()), ValueError, rf"y_random: .* \[{B}, {K}\], got float32"),
        (
            lambda: head.losses(x, y.tolist(), xr, yr),
            TypeError,
            "y_balanced: expected a torch.Tensor, got list",
        ),
        (lambda: head.slot_usage(x, y[1:]), ValueError, rf"labels: expected shape \[{B}\], got \[{B - 1}\]"),
        (
            lambda: head.slot_usage(x, y.float()),
            TypeError,
            "labels: expected an integer .* got torch.float32",
        ),
        (lambda: SlotUsage(head).update_slots(y, y), ValueError, rf"slots: expected shape \[B, {K}\], got"),
        (lambda: head.add_displacements(0), ValueError, "num: expected an integer from 1 to 255, got 0"),
        (lambda: head.add_displacements(scale=-1), ValueError, "scale: expected a finite number above 0"),
        (lambda: head.add_displacements(values=[[1.0]]), TypeError, "values: expected a floating.* got list"),
        (lambda: head.add_displacements(values=x[:, 1:]), ValueError, rf"values: expected shape \[m, {D}\]"),
        (lambda: head.add_displacements(values=x[:0]), ValueError, rf"values: .* got \[0, {D}\]"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=f"^{words}"):
            call()
