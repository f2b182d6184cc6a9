"""Tests of slot usage, of its warnings, and of the errors of the heads."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gistops.nn import ConstellationClassifier, GistClassifier, SlotUsage, SubcenterClassifier

from .samples import KINDS, B, D, K, M, batch, spread


@pytest.mark.parametrize("kind", KINDS)
def test_slot_usage_counts_the_slots_of_the_own_class(kind: type[ConstellationClassifier], seed: int) -> None:
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


def test_zero_displacements_warn_once(seed: int) -> None:
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


def test_unused_displacements_warn_once(seed: int) -> None:
    x, y = batch(size=600)
    away = GistClassifier(D, K)
    with torch.no_grad():  # every displacement has a negative product with every feature
        x = x.abs()
        away.displacements.copy_(-away.displacements.abs() - 0.2)
    with pytest.warns(
        RuntimeWarning, match=r"slot 0, the bare center, won all of 600 samples\. Start .*=0\.$"
    ):
        assert away.slot_usage(x, y).tolist() == [1, 0, 0, 0, 0]
    partly = ConstellationClassifier(D, K)
    with torch.no_grad():
        partly.displacements[[0, 2]] = away.displacements[[0, 2]]
        partly.displacements[1] = torch.arange(D) % 2  # wins for features that are large at odd indices
        partly.displacements[3] = 1 - partly.displacements[1]
    with pytest.warns(RuntimeWarning, match=r"slots 1, 3 won none of 600 samples\. .*=2\.$"):
        partly.slot_usage(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        away.slot_usage(x, y)
        partly.slot_usage(x, y)
        few = GistClassifier(D, K)
        few.load_state_dict(away.state_dict())
        few.slot_usage(x[:499], y[:499])  # fewer than 100 samples per slot
        spread(GistClassifier(D, K)).slot_usage(*batch(size=3000))
        GistClassifier(D, K, 0).slot_usage(*batch(size=3000))
        ahead = ConstellationClassifier(D, K, 1)
        ahead.displacements.data = ahead.displacements.data.abs() + 0.2
        assert ahead.slot_usage(x, y).tolist() == [0, 1]  # slot 0 has no parameters


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"in_features": 0}, ValueError, "in_features: expected an integer of at least 1, got 0"),
    ({"num_classes": 2.5}, TypeError, "num_classes: expected an integer .* got 2.5 of type float"),
    ({"num_displacements": 256}, ValueError, "num_displacements: expected an integer from 0 to 255, got 256"),
    ({"num_displacements": None}, TypeError, "num_displacements: .* got None of type NoneType"),
    ({"tau": 0}, ValueError, "tau: expected a finite number above 0, got 0"),
    ({"tau": math.nan}, ValueError, "tau: expected a finite number above 0, got nan"),
    (
        {"tau": 1e300},
        ValueError,
        r"tau: expected .* to 3.4e\+38 for parameters of torch.float32, got 1e\+300",
    ),
    ({"tau": 1e-300}, ValueError, r"tau: expected 1.18e-38 to .* got 1e-300"),
    ({"tau": 1e5, "dtype": torch.float16}, ValueError, r"tau: .* 6.55e\+04 .* torch.float16, got 100000.0"),
    ({"tau": "16"}, TypeError, "tau: expected a finite number above 0, got str"),
    (
        {"displacement_scale": 0.0},
        ValueError,
        "displacement_scale: expected a finite number above 0, got 0.0",
    ),
    ({"dtype": torch.int64}, TypeError, "dtype: expected float32, .* got torch.int64"),
    ({"backend": "fast"}, ValueError, "backend: expected None or one of 'cpu', .* got 'fast'"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bad", "error", "words"), BAD, ids=[str(b[0]) for b in BAD])
def test_bad_arguments_raise(
    kind: type[nn.Module], bad: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=f"^{words}$"):
        kind(**{"in_features": D, "num_classes": K, **bad})


def test_bad_calls_raise(seed: int) -> None:
    head = GistClassifier(D, K, 0)
    (x, y), (xr, yr) = batch(), batch()
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: head(x[:, 1:]), ValueError, rf"centers: expected shape \[K, {D - 1}\]"),
        (lambda: head.losses(x, y[1:], xr, yr), ValueError, rf"y_balanced: .* got int64 \[{B - 1}\]"),
        (
            lambda: head.losses(x, y, xr, yr.short()),
            ValueError,
            rf"y_random: expected int64 or int32 \[{B}\] or .* int16",
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
        (
            lambda: SlotUsage(head).update_slots(y, y),
            ValueError,
            rf"slots: expected shape \[\.\.\., {K}\], got",
        ),
        (lambda: SlotUsage(head).update_slots([[0]], y), TypeError, "slots: expected an integer .* got list"),
        (lambda: SlotUsage(head).update_slots(x, y), TypeError, "slots: expected an .* got torch.float32"),
        (lambda: SlotUsage(head).update(x, y > 1), TypeError, "labels: expected an .* got torch.bool"),
        (
            lambda: SlotUsage(SubcenterClassifier(D, K)),  # type: ignore[arg-type]
            TypeError,
            "head: expected a ConstellationClassifier or a GistClassifier, got SubcenterClassifier",
        ),
        (lambda: SlotUsage(head.freeze()), TypeError, "head: expected .* got FrozenClassifier"),  # type: ignore[arg-type]
        (lambda: head.add_displacements(0), ValueError, "num: expected an integer from 1 to 255, got 0"),
        (lambda: head.add_displacements(scale=-1), ValueError, "scale: expected a finite number above 0"),
        (lambda: head.add_displacements(values=[[1.0]]), TypeError, "values: expected a floating.* got list"),
        (lambda: head.add_displacements(values=x[:, 1:]), ValueError, rf"values: expected shape \[m, {D}\]"),
        (lambda: head.add_displacements(values=x[:0]), ValueError, rf"values: .* got \[0, {D}\]"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=f"^{words}"):
            call()


@pytest.mark.cpu  # a device-side assertion makes the GPU unusable for the process
def test_labels_out_of_range_are_named(seed: int) -> None:
    head, (x, y) = GistClassifier(D, K, 0), batch()
    with pytest.raises(IndexError, match=f"^labels: expected 0 to {K - 1}, got -100 at position 2$"):
        SlotUsage(head).update(x, y.index_fill(0, torch.tensor([2]), -100))
    with pytest.raises(IndexError, match=f"^labels: expected 0 to {K - 1}, got {K} at position 0$"):
        head.slot_usage(x, torch.full((B,), K, dtype=torch.uint8))


def test_a_temperature_for_float64_alone_survives_export() -> None:
    head = GistClassifier(D, K, tau=1e100, dtype=torch.float64)
    assert torch.equal(head.export().tau, head.tau)
    half = GistClassifier(D, K, tau=1e5).half()
    assert torch.equal(half.export().centers, half.centers)
    with pytest.raises(ValueError, match=r"^tau: expected .* for parameters of torch\.float32"):
        SubcenterClassifier(D, K, tau=1e100)
