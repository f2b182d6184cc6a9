"""Cases of the host-compiled cross-entropy against the definition in float64; run by test_kernels.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gistops._classifier import Classifier, LossOptions
from gistops.backends import reference
from tests.ops import test_cancellation as cancellation
from tests.ops.oracle import Sample, allowed, error, leaves, plain, scores

from .host_cross_entropy import HostLoss
from .logits_cases import assert_same_bits_in_any_order, of_few_elements

half, bf16, f64 = torch.float16, torch.bfloat16, torch.float64
#: Options by name; "each" stands for a vector with one value per class.
EVERYTHING = {"class_bias": "each", "weight": "each", "margin": "each", "label_smoothing": 0.1}
CASES: list[tuple[Sample, dict[str, Any]]] = [
    (Sample(70, 133, 69, 4), {}),
    (Sample(140, 70, 40, 4), {"class_bias": "each", "weight": "each", "label_smoothing": 0.1}),
    (Sample(14, 133, 40, 12), EVERYTHING | {"margin_kind": "angle", "reduction": "none"}),
    (Sample(14, 70, 33, 0), {"margin": 0.3, "margin_kind": "cosine", "reduction": "sum"}),
    (Sample(5, 7, 3, 2), {"margin": 0.5, "margin_kind": "logit", "label_smoothing": 1.0}),
    (Sample(1, 1, 1, 0), {}),
    (Sample(14, 70, 33, 2, f64, f64, f64), EVERYTHING | {"margin_kind": "angle"}),
    (Sample(130, 300, 136, 4, bf16, bf16, bf16), {}),
    (Sample(33, 66, 33, 4, bf16, bf16, bf16), EVERYTHING | {"margin_kind": "cosine"}),
    (Sample(20, 40, 24, 3, half, half, half), {"weight": "each"}),
]
#: Sizes whose scores can be parked.
PARKED_CASES: list[tuple[Sample, dict[str, Any]]] = [
    (Sample(70, 133, 160, 4, bf16, bf16, bf16), {}),
    (Sample(14, 70, 32, 0, half, half, half), {"margin": 0.3, "margin_kind": "cosine", "reduction": "sum"}),
    (Sample(33, 66, 96, 7, half, half, half), EVERYTHING | {"margin_kind": "angle", "reduction": "none"}),
    (Sample(130, 40, 288, 3, bf16, bf16, bf16), EVERYTHING),
    (Sample(300, 20, 608, 4, bf16, bf16, bf16), {"class_bias": "each", "margin": 0.3}),
    (Sample(140, 20, 288, 6, bf16, bf16, bf16), {"weight": "each", "label_smoothing": 0.1}),
]
IDS = [f"{sample.id}-{'-'.join(options) or 'plain'}" for sample, options in CASES]


def make_options(sample: Sample, options: dict[str, Any], seed: int) -> tuple[Tensor, dict[str, Any]]:
    """Return targets, one of them ignored, and the options with their vectors."""
    source = torch.Generator().manual_seed(seed)
    target = torch.randint(sample.K, (sample.B,), generator=source)
    if sample.B > 3:
        target[2] = -100
    vectors = {
        name: torch.rand(sample.K, generator=source) * 0.5 + 0.1
        if value == "each"
        else torch.as_tensor(value)
        for name, value in options.items()
        if name in ("class_bias", "weight", "margin")
    }
    return target, options | vectors


def truth(
    tensors: list[Tensor], target: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return loss, lse and the leaves of the definition in float64."""
    wide = leaves(tensors, f64)
    vectors = [options.get(name) for name in ("class_bias", "weight", "margin")]
    bias, weight, margin = (None if v is None else v.double() for v in vectors)
    learned = [v.requires_grad_() for v in (bias, margin) if v is not None]
    x, *rest = wide
    loss_options = LossOptions(**options | {"class_bias": bias, "weight": weight, "margin": margin})
    loss, lse = reference.cross_entropy(x, Classifier(*rest), target, loss_options)
    return loss, lse, [*wide, *learned]


@pytest.mark.parametrize("kind", [None, "cosine", "angle"])
@pytest.mark.parametrize("where", ["kept", "recomputed"])
def test_gradient_of_a_tiny_tau(where: str, kind: str | None, module: Any, seed: int) -> None:
    """It is exact even if tau times a cosine is zero, and the cosine of an angular margin too."""
    tensors = [*Sample(14, 70, 33, 3).tensors(seed)[:3], torch.tensor(1e-44, requires_grad=True)]
    given = {"margin": 0.3, "margin_kind": kind} if kind else {}
    target, options = make_options(Sample(14, 70, 33, 3), {"reduction": "sum"} | given, seed)
    loss, _, wide = truth(tensors, target, options)
    ours = HostLoss(module, tensors, target, where, **options)
    value = ours.gradients(torch.ones(()), None)[3]
    assert value is not None
    assert error(value, torch.autograd.grad(loss, wide[3])[0]) <= 1e-4


def distinct(sample: Sample, near: float, seed: int) -> list[Tensor]:
    """Return tensors whose best two slots differ by more than roundings, so that every chunk chooses the same slots."""
    for attempt in range(1000):
        tensors = sample.tensors(seed + attempt)
        with torch.no_grad():
            if near:
                tensors[1][7:90] = -tensors[2][1] + near * tensors[1][7:90]
            cosines = scores(*(t.double() for t in tensors[:3]))
            if sample.m == 0 or (-cosines.topk(2, dim=2).values.diff(dim=2)).min() > 1e-6:
                return tensors
    raise AssertionError("expected a sample without near-ties among 1000")


def check(
    sample: Sample, options: dict[str, Any], where: str, module: Any, seed: int, near: float = 0.0
) -> None:
    """Compare loss, lse and all gradients.

    where: Where the scores are from the forward to the backward.
    near: After a displacement cancels a center, this fraction of the center remains; 0: no center is cancelled.
    """
    tensors = distinct(sample, near, seed)
    target, options = make_options(sample, options, seed)
    ours = HostLoss(module, tensors, target, where, **options)
    loss, lse, wide = truth(tensors, target, options)
    assert ours.targets_in_range
    if near:
        assert (torch.from_numpy(ours.saved["center_rnorms"]) < 0).any()
    logits = wide[3] * scores(*wide[:3]).max(2).values
    bound = allowed(error(plain(tensors)[0], logits), logits, ours.sums)
    assert error(ours.lse, lse) <= bound
    weights = 1.0 if options.get("reduction") != "sum" else sample.B
    assert error(ours.loss, loss) <= 2 * bound * weights
    source = torch.Generator().manual_seed(seed + 1)
    grads = [torch.randn(x.shape, generator=source) for x in (loss, lse)]
    total = (loss * grads[0]).sum() + (lse * grads[1]).sum()
    gradients = [g for g in ours.gradients(*grads) if g is not None]
    terms = max(sample.B, sample.K) * (sample.B if near else 1)
    for i, (value, true) in enumerate(zip(gradients, torch.autograd.grad(total, wide), strict=True)):
        dtype = ours.operands if i < 3 else ours.sums
        bound = allowed(0.0, true, dtype, terms)
        if sample.d <= 3 and i < 3 and len(wide[i]):
            bound += of_few_elements(wide[i], wide[3], grads)
        # the sums of tau and the bias cancel
        bound += (i > 2) * 64 * torch.finfo(ours.sums).eps * (1 + float(lse.detach().abs().max()))
        assert error(value, true) <= bound, i


@pytest.mark.parametrize("where", ["kept", "recomputed"])
@pytest.mark.parametrize(("sample", "options"), CASES, ids=IDS)
def test_loss(sample: Sample, options: dict[str, Any], where: str, module: Any, seed: int) -> None:
    check(sample, options, where, module, seed)


@pytest.mark.parametrize(("sample", "options"), PARKED_CASES, ids=[s.id for s, _ in PARKED_CASES])
def test_loss_with_parked_scores(sample: Sample, options: dict[str, Any], module: Any, seed: int) -> None:
    check(sample, options, "parked", module, seed)


@pytest.mark.parametrize("m", [2, 7])
def test_loss_with_parked_scores_of_cancelled_centers(m: int, module: Any, seed: int) -> None:
    check(Sample(37, 129, 96, m, bf16, bf16, bf16), {}, "parked", module, seed, near=1e-3)
    check(Sample(20, 129, 64, m, half, half, half), EVERYTHING, "parked", module, seed, near=1e-2)


@pytest.fixture
def small_limits(module: Any) -> Iterator[None]:
    """Set limits that small samples exceed, so that they are computed in chunks of classes."""
    module.set_limits(3200, 3200)
    yield
    module.reset_limits()


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("where", ["kept", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, bf16])
def test_loss_in_chunks_of_classes(where: str, dtype: torch.dtype, module: Any, seed: int) -> None:
    check(Sample(70, 333, 69, 4, dtype, dtype, dtype), EVERYTHING, where, module, seed)
    scalar = EVERYTHING | {"margin": 0.3, "margin_kind": "cosine"}
    check(Sample(37, 333, 40, 3, dtype, dtype, dtype), scalar, where, module, seed, near=1e-2)


@pytest.mark.parametrize("m", [3, 12])
@pytest.mark.parametrize("dtype", [torch.float32, bf16, f64])
def test_loss_of_centers_that_a_displacement_nearly_cancels(
    m: int, dtype: torch.dtype, module: Any, seed: int
) -> None:
    check(Sample(37, 129, 24, m, dtype, dtype, dtype), {}, "kept", module, seed, near=1e-3)


@pytest.mark.parametrize("where", ["kept", "recomputed"])
def test_loss_of_centers_that_a_displacement_cancels_to_any_degree(
    where: str, module: Any, seed: int
) -> None:
    for closeness in cancellation.CLOSENESS:
        tensors, target = cancellation.sample(20, 24, closeness, seed)
        ours = HostLoss(module, tensors, target, where, reduction="sum")
        gradients = ours.gradients(torch.ones(()), None)[:4]
        cancellation.assert_close([ours.loss, *gradients], tensors, target)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("value", [-1e9, 1e9, -torch.inf, torch.inf])
def test_loss_of_extreme_biases(value: float, smoothing: float, module: Any, seed: int) -> None:
    """One class with an extreme bias is the target of some rows, and its class weight is 0 unless that gives NaN."""
    tensors = Sample(12, 40, 19, 2).tensors(seed)
    target = torch.arange(12)
    bias, weight = torch.randn(40), torch.rand(40) + 0.5
    bias[5] = value
    weight[5] = abs(value) == torch.inf
    options = {"class_bias": bias, "weight": weight, "label_smoothing": smoothing, "reduction": "none"}
    ours = HostLoss(module, tensors, target, **options)
    loss, lse, wide = truth(tensors, target, options)
    close = {"atol": 2e-4, "rtol": 1e-5, "equal_nan": True, "check_dtype": False}
    torch.testing.assert_close(ours.loss, loss.detach(), **close)
    torch.testing.assert_close(ours.lse, lse.detach(), **close)
    gradients = [g for g in ours.gradients(torch.ones(12), torch.ones(12)) if g is not None]
    for gradient, true in zip(gradients, torch.autograd.grad(loss.sum() + lse.sum(), wide), strict=True):
        if true.isfinite().all():
            torch.testing.assert_close(gradient, true, **close)
        else:
            assert not gradient.isfinite().all()


@pytest.mark.parametrize("where", ["kept", "parked"])
@pytest.mark.parametrize("dtype", [bf16, half])
@pytest.mark.parametrize("value", [1e9, 3e38, torch.finfo(torch.float32).min])
def test_gradients_of_extreme_biases_in_half_precision(
    value: float, dtype: torch.dtype, where: str, module: Any, seed: int
) -> None:
    """One class has a large positive bias; or all classes but one, the target, have a large negative bias."""
    tensors = Sample(12, 40, 32, 2, dtype, dtype, dtype).tensors(seed)
    if value > 0:
        bias, target = torch.randn(40), torch.arange(12)
        bias[5] = value
    else:
        bias, target = torch.full((40,), value), torch.full((12,), 5)
        bias[5] = 0.3
    options = {"class_bias": bias, "reduction": "none"}
    ours = HostLoss(module, tensors, target, where, **options)
    loss, lse, wide = truth(tensors, target, options)
    found = [g for g in ours.gradients(torch.ones(12), torch.ones(12)) if g is not None]
    for gradient, true in zip(found, torch.autograd.grad(loss.sum() + lse.sum(), wide), strict=True):
        assert error(gradient, true) <= 0.05 * float(true.abs().max())


@pytest.mark.parametrize("m", [2, 12])
def test_loss_gradients_of_slots_that_do_not_exist(m: int, module: Any, seed: int) -> None:
    tensors = Sample(20, 40, 24, m).tensors(seed)
    ours = HostLoss(module, tensors, torch.arange(20))
    ours.saved["slots"].fill(255)
    assert all(g is None or g.isfinite().all() for g in ours.gradients(torch.ones(()), None))


def test_loss_of_targets_out_of_range(module: Any, seed: int) -> None:
    tensors = Sample(40, 70, 24, 3).tensors(seed)
    for wrong in (-1, 70, 1 << 40):
        target = torch.zeros(40, dtype=torch.int64)
        target[33] = wrong
        ours = HostLoss(module, tensors, target)
        assert not ours.targets_in_range
        ours.gradients(torch.ones(()), None)  # stays within its memory


@pytest.mark.parametrize("where", ["kept", "parked"])
def test_loss_of_targets_without_weight_is_nan(where: str, module: Any, seed: int) -> None:
    """A mean over no weight is NaN, and so are its gradients; that of an ignored row is zero."""
    tensors = Sample(12, 40, 48, 2, bf16, bf16, bf16).tensors(seed)
    target = torch.full((12,), 3)
    target[5:] = -100
    weight = torch.rand(40) + 0.5
    weight[3] = 0
    ours = HostLoss(module, tensors, target, where, weight=weight, label_smoothing=0.1)
    assert ours.loss.isnan()
    gradients = [g for g in ours.gradients(torch.ones(()), None) if g is not None]
    assert gradients[0][:5].isnan().all()
    assert not gradients[0][5:].any()
    assert all(gradient.isnan().any() for gradient in gradients)


def test_loss_of_zero_vectors_and_no_rows(module: Any, seed: int) -> None:
    tensors = Sample(6, 40, 19, 2).tensors(seed)
    with torch.no_grad():
        tensors[0][2] = 0
        tensors[1][5] = 0
        tensors[1][9] = -tensors[2][0]
    target = torch.arange(6) + 10
    ours = HostLoss(module, tensors, target)
    loss, lse, _ = truth(tensors, target, {})
    torch.testing.assert_close(ours.loss.double(), loss.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.lse.double(), lse.detach(), atol=1e-5, rtol=1e-5)
    for gradient in ours.gradients(torch.ones(()), None):
        assert gradient is None or gradient.isfinite().all()
    none = HostLoss(module, Sample(0, 40, 19, 2).tensors(seed), target[:0])
    assert none.loss.isnan()
    assert none.targets_in_range
    for gradient in none.gradients(torch.ones(()), None):
        assert gradient is None or not gradient.any()


@pytest.mark.parametrize("where", ["kept", "parked"])
def test_loss_same_bits_in_any_order_of_threads(where: str, module: Any, seed: int) -> None:
    sample = Sample(70, 133, 160, 4, bf16, bf16, bf16)
    target, options = make_options(sample, EVERYTHING, seed)
    tensors = sample.tensors(seed)

    def bits() -> list[Tensor | None]:
        ours = HostLoss(module, tensors, target, where, **options)
        gradients = ours.gradients(torch.ones(()), torch.ones(70))
        return [ours.loss, ours.lse, *(g for g in gradients if g is not None)]

    assert_same_bits_in_any_order(module, seed, bits)
