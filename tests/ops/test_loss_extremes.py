"""Losses of huge and infinite biases and margins: what `F.cross_entropy` gives for logits in float64, on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gistops

from .oracle import Sample

f64, inf, nan = torch.float64, math.inf, math.nan
TARGET = 3  # of every second row
CASES: list[dict[str, Any]] = [
    {"bias": {TARGET: -1e9}},
    {"bias": {TARGET: -inf}},
    {"bias": {TARGET: 1e9}},
    {"bias": {5: -1e9, 6: -inf}},
    {"bias": {5: 1e9}},
    {"bias": {TARGET: -1e9}, "weight": {TARGET: 0.0}},
    {"bias": {5: -1e9}, "weight": {5: 0.0}},
    {"bias": {5: 1e9}, "weight": {5: 0.0, TARGET: 0.0}},
    {"bias": {5: inf}},
    {"bias": {TARGET: inf}},
    {"bias": dict.fromkeys(range(9), -inf)},
    {"bias": {TARGET: -inf}, "weight": {TARGET: 0.0}},
    {"margin": 1e9},
    {"margin": -1e9},
    {"margin": -1e9, "weight": {k: 0.0 for k in range(9) if k != TARGET}},
    {"margin": 1e9, "margin_kind": "cosine"},
    {"margin": 1e9, "weight": {TARGET: 0.0}, "bias": {TARGET: -1e9}},
]
#: Cases for slow backends.
FEW = [CASES[i] for i in (1, 2, 5, 8, 9, 13, 14, 15)]


def identifier(case: dict[str, Any]) -> str:
    return "-".join(f"{name}{value}" for name, value in case.items()).translate(
        str.maketrans("", "", "{}:, ")
    )


def changed(values: Tensor, changes: dict[int, float]) -> Tensor:
    values = values.clone()
    for place, value in changes.items():
        values[place] = value
    return values


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("case", CASES, ids=identifier)
def test_extreme_biases_and_margins(case: dict[str, Any], smoothing: float, backend: str, seed: int) -> None:
    """Loss, lse and gradients are those of the logits; they are infinite or NaN only where theirs are."""
    x, w, delta, tau = Sample(8, 9, 6, 2).tensors(seed)
    target = torch.tensor([TARGET, 1] * 4)
    target[6] = -100
    bias = changed(torch.randn(9), case.get("bias", {})).requires_grad_()
    weight = changed(torch.rand(9) + 0.5, case["weight"]) if "weight" in case else None
    margin, kind = case.get("margin", 0.0), case.get("margin_kind", "logit")
    leaves = [x, w, delta, tau, bias]
    loss, lse = gistops.constellation_cross_entropy(
        *leaves[:4], target, class_bias=bias, weight=weight, margin=margin, margin_kind=kind,
        label_smoothing=smoothing, reduction="none", return_lse=True, backend=backend,
    )  # fmt: skip
    wide = [t.detach().double().requires_grad_() for t in leaves]
    logits = gistops.constellation_logits(*wide[:4], backend="reference")
    lowered = logits - margin * (wide[3] if kind == "cosine" else 1)
    is_target = F.one_hot(target.clamp(min=0), 9).bool() & (target >= 0)[:, None]
    scores = torch.where(is_target, lowered, logits) + wide[4]
    wide_weight = None if weight is None else weight.double()
    true = F.cross_entropy(scores, target, wide_weight, reduction="none", label_smoothing=smoothing)
    true_lse = scores.logsumexp(1)
    true_lse = torch.where(true_lse == inf, nan, true_lse)
    close(loss, true)
    close(lse, true_lse)
    for rows in (slice(None), target == TARGET):
        grads = torch.autograd.grad(loss[rows].sum() + 0.5 * lse[rows].sum(), leaves, retain_graph=True)
        expected = torch.autograd.grad(true[rows].sum() + 0.5 * true_lse[rows].sum(), wide, retain_graph=True)
        for value, truth in zip(grads, expected, strict=True):
            if truth.isfinite().all():
                close(value, truth)
            else:
                assert not value.isfinite().all()


def test_a_gradient_that_is_nan_stays_nan(backend: str, seed: int) -> None:
    """Also in rows of weight 0 and in rows whose loss has no slope; an ignored row has no gradient whatever comes."""
    torch.manual_seed(seed)
    x = torch.randn(3, 8, requires_grad=True)
    w = torch.cat([x.detach()[:1], torch.randn(4, 8)])
    target, weight = torch.tensor([0, 1, -100]), torch.tensor([1.0, 0, 1, 1, 1])
    loss = gistops.constellation_cross_entropy(
        x,
        w.requires_grad_(),
        torch.empty(0, 8),
        1e4,
        target,
        weight=weight,
        reduction="none",
        backend=backend,
    )
    for row, ignored in enumerate([False, False, True]):
        upstream = torch.zeros(3).index_fill(0, torch.tensor(row), nan)
        (gradient,) = torch.autograd.grad(loss, x, upstream, retain_graph=True)
        assert gradient[row].isnan().all() != ignored
        assert gradient.nan_to_num().abs().sum() == 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["logit", "cosine", "angle"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_an_ignored_row_has_the_weight_and_the_margin_of_no_class(
    with_bias: bool, kind: str, reduction: str, backend: str, seed: int
) -> None:
    """Inverse frequencies as weights are infinite for a class without samples, and so may margins be."""
    leaves = Sample(8, 9, 6, 2).tensors(seed)
    target = torch.tensor([TARGET, 1, -100, 5] * 2)
    vectors = {"weight": torch.rand(9) + 0.5, "margin": torch.rand(9)}
    if with_bias:
        vectors["class_bias"] = torch.randn(9)

    def results(target: Tensor, first: float) -> list[Tensor]:
        options: dict[str, Any] = {
            name: changed(value, {0: first}) if name != "class_bias" else value
            for name, value in vectors.items()
        }
        if kind == "angle":  # margins are from 0 to π there
            options["margin"] = vectors["margin"]
        x, w, delta, tau = leaves
        rows = target != 0
        loss = gistops.constellation_cross_entropy(
            x[rows], w, delta, tau, target[rows], **options, margin_kind=kind, reduction=reduction, backend=backend
        )  # fmt: skip
        assert isinstance(loss, Tensor)
        return [loss, *torch.autograd.grad(loss, leaves)]

    expected = results(torch.where(target == -100, 0, target), 0.5)  # without the ignored rows
    for value, truth in zip(results(target, inf), expected, strict=True):
        close(value, truth.double())


def test_an_infinite_negative_margin_is_nan(backend: str, seed: int) -> None:
    """The cross-entropy of a logit of plus infinity is NaN too."""
    leaves = Sample(8, 9, 6, 2).tensors(seed)
    margin = changed(torch.rand(9), {TARGET: -inf})
    target = torch.tensor([TARGET, 1] * 4)
    loss = gistops.constellation_cross_entropy(
        *leaves, target, margin=margin, reduction="none", backend=backend
    )
    assert torch.equal(loss.isnan(), target == TARGET)  # type: ignore[union-attr]


@pytest.mark.parametrize("ignored", [0, 1])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_a_mean_of_targets_without_weight_is_nan(
    smoothing: float, ignored: int, backend: str, seed: int
) -> None:
    """Loss and gradients are NaN where those of `F.cross_entropy` are. The gradient of an ignored row is zero."""
    leaves = Sample(4, 9, 6, 0).tensors(seed)
    target = torch.tensor([TARGET] * (4 - ignored) + [-100] * ignored)
    weight = changed(torch.rand(9) + 0.5, {TARGET: 0.0})
    loss = gistops.constellation_cross_entropy(
        *leaves, target, weight=weight, label_smoothing=smoothing, backend=backend
    )
    logits = gistops.constellation_logits(*leaves, backend="reference")
    true = F.cross_entropy(logits, target, weight, label_smoothing=smoothing)
    assert true.isnan()
    assert loss.isnan()  # type: ignore[union-attr]
    grads = torch.autograd.grad(loss, leaves)  # type: ignore[arg-type]
    for value, truth in zip(grads, torch.autograd.grad(true, leaves), strict=True):
        assert torch.equal(value.isnan(), truth.isnan())
        assert not value.nan_to_num().any()


def close(value: Tensor, truth: Tensor) -> None:
    """Compare with a tolerance of 64 roundings, relative to each element, and to 1 and τ for sums that cancel."""
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=2e-4, equal_nan=True)
