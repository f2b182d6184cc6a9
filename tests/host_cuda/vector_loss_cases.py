"""Cases of the host-compiled loss of sub-centers and of rotations against the definition in float64; run by test_kernels.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gistops._classifier import Classifier, no_displacements
from gistops.functional.transforms import rotation
from tests.ops.oracle import allowed, error
from tests.ops.vector_oracle import VectorSample, by_definition

from .cross_entropy_cases import EVERYTHING, make_options
from .cross_entropy_cases import small_limits as small_limits  # a fixture
from .host_cross_entropy import HostLoss
from .logits_cases import assert_same_bits_in_any_order

f32, half, bf16, f64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


class Ours(NamedTuple):
    """A loss by the kernels, and the differentiable operands that it was computed from."""

    host: HostLoss
    operands: list[Tensor]  # input, centers, tau, and the coefficients

    def gradients(
        self, leaves: list[Tensor], grad_loss: Tensor | None, grad_lse: Tensor | None
    ) -> list[Tensor]:
        """Return the gradients of the leaves, of the bias and of the margin."""
        x, w, _, tau, *others = self.host.gradients(grad_loss, grad_lse)
        found = [x, w, tau, *(g for g in others[:2] if g is not None)]
        upstream = [g.to(t.dtype) for g, t in zip(found, self.operands, strict=True) if g is not None]
        through = [(t, g) for t, g in zip(self.operands, upstream, strict=True) if t.requires_grad]
        tensors, grads = zip(*through, strict=True)
        return [*torch.autograd.grad(tensors, leaves, grads), *(g for g in others[2:] if g is not None)]


def run(
    module: Any, tensors: list[Tensor], target: Tensor, where: str, **options: Any
) -> tuple[Ours, list[Tensor]]:
    """Return the loss by the kernels, and its leaves."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    x, w, tau, *turns = leaves
    coeffs: tuple[Tensor | None, Tensor | None] = (None, None)
    operands = [x, w, tau]
    if turns:
        sums = torch.float64 if x.dtype == torch.float64 else torch.float32
        classifier = Classifier(w.to(sums), turns[0], tau, "rotation", turns[1])
        wide_x, wide_w, *both = rotation.coefficients(x.to(sums), classifier)
        operands, coeffs = [wide_x, wide_w, tau, *both], (both[0], both[1])
    given = [operands[0].to(x.dtype), operands[1].to(w.dtype), no_displacements(x), tau]
    return Ours(HostLoss(module, given, target, where, coeffs=coeffs, **options), operands), leaves


CASES: list[tuple[VectorSample, dict[str, Any]]] = [
    (VectorSample("subcenters", 70, 133, 3, 69), {}),
    (VectorSample("subcenters", 140, 70, 2, 40), {"class_bias": "each", "weight": "each", "label_smoothing": 0.1}),
    (VectorSample("subcenters", 14, 133, 7, 40), EVERYTHING | {"margin_kind": "angle", "reduction": "none"}),
    (VectorSample("subcenters", 14, 40, 40, 33), {"margin": 0.3, "margin_kind": "cosine", "reduction": "sum"}),
    (VectorSample("subcenters", 20, 30, 1, 16), EVERYTHING),
    (VectorSample("subcenters", 14, 70, 3, 33, f64), EVERYTHING | {"margin_kind": "angle"}),
    (VectorSample("subcenters", 130, 100, 3, 136, bf16), {}),
    (VectorSample("subcenters", 33, 66, 4, 33, bf16), EVERYTHING | {"margin_kind": "cosine"}),
    (VectorSample("subcenters", 20, 40, 3, 24, half), {"weight": "each"}),
    (VectorSample("rotation", 140, 12, 5, 40), {}),
    (VectorSample("rotation", 30, 70, 3, 40), {"class_bias": "each", "weight": "each", "label_smoothing": 0.1}),
    (VectorSample("rotation", 14, 133, 10, 40), EVERYTHING | {"margin_kind": "angle", "reduction": "none"}),
    (VectorSample("rotation", 14, 40, 2, 33), {"margin": 0.3, "margin_kind": "cosine", "reduction": "sum"}),
    (VectorSample("rotation", 20, 30, 1, 16), EVERYTHING),
    (VectorSample("rotation", 14, 70, 3, 33, f64), EVERYTHING | {"margin_kind": "angle"}),
    (VectorSample("rotation", 130, 20, 5, 40, bf16), {}),
    (VectorSample("rotation", 33, 66, 4, 40, bf16), EVERYTHING | {"margin_kind": "cosine"}),
    (VectorSample("rotation", 20, 40, 3, 24, half), {"weight": "each"}),
]  # fmt: skip


def check(sample: VectorSample, options: dict[str, Any], where: str, module: Any, seed: int) -> float:
    """Compare loss, lse and all gradients; return the largest error in units of its bound."""
    tensors = sample.tensors(seed)
    target, options = make_options(sample, options, seed)  # type: ignore[arg-type]
    ours, leaves = run(module, tensors, target, where, **options)
    loss, lse, wide = by_definition(tensors, target, options, f64)
    plain_loss, plain_lse, plain = by_definition(tensors, target, options, ours.host.sums)
    assert ours.host.targets_in_range
    size = tensors[2].detach().double()  # the largest logit
    weights = sample.B if options.get("reduction") == "sum" else 1
    ratios = [
        error(ours.host.lse, lse) / allowed(error(plain_lse, lse), size, ours.host.sums, sample.d),
        error(ours.host.loss, loss)
        / (2 * weights * allowed(error(plain_loss, loss), size, ours.host.sums, sample.d)),
    ]
    source = torch.Generator().manual_seed(seed + 1)
    grads = [torch.randn(x.shape, generator=source) for x in (loss, lse)]
    found = ours.gradients(leaves, *grads)
    pairs = ((loss, lse, wide), (plain_loss, plain_lse, plain))
    true, rounded = (
        torch.autograd.grad((a, b), x, [g.to(a) for g in grads], materialize_grads=True) for a, b, x in pairs
    )
    for i, (value, g, h) in enumerate(zip(found, true, rounded, strict=True)):
        is_scale = value.dim() == 0 or len(value) == 1  # tau, or a margin: the terms of its sum cancel
        # Those of input and centers are products with H, which is rounded to the operands' type.
        dtype = ours.host.operands if i < 2 else ours.host.sums
        bound = allowed(error(h, g), g, dtype, sample.B * sample.K if is_scale else max(sample.B, sample.K))
        if ours.host.sums == f64:  # the reference in float64 has the error of plain PyTorch too
            bound *= 4
        ratios.append(error(value, g) / (bound + is_scale * 16 * torch.finfo(ours.host.sums).eps * sample.B))
    return max(ratios)


@pytest.mark.parametrize("where", ["kept", "recomputed"])
@pytest.mark.parametrize(("sample", "options"), CASES, ids=[s.id for s, _ in CASES])
def test_loss_of_vectors(
    sample: VectorSample, options: dict[str, Any], where: str, module: Any, seed: int
) -> None:
    assert check(sample, options, where, module, seed) <= 1


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("where", ["kept", "recomputed"])
@pytest.mark.parametrize("dtype", [f32, bf16])
@pytest.mark.parametrize("form", ["subcenters", "rotation"])
def test_loss_of_vectors_in_chunks_of_classes(
    form: str, dtype: torch.dtype, where: str, module: Any, seed: int
) -> None:
    assert check(VectorSample(form, 37, 133, 3, 40, dtype), EVERYTHING, where, module, seed) <= 1


def exact_vectors(form: str, seed: int) -> list[Tensor]:
    tensors = VectorSample(form, 12, 40, 3, 24).tensors(seed)
    with torch.no_grad():
        tensors[0][2] = 0
        tensors[1][5] = 0
        if form == "subcenters":
            tensors[1][9, 1] = 0
    return tensors


@pytest.mark.parametrize("form", ["subcenters", "rotation"])
def test_loss_of_zero_vectors(form: str, module: Any, seed: int) -> None:
    tensors = exact_vectors(form, seed)
    target = torch.arange(12) + 10
    ours, leaves = run(module, tensors, target, "kept")
    loss, lse, _ = by_definition(tensors, target, {}, f64)
    assert error(ours.host.loss, loss) <= 1e-5 * (1 + float(loss.detach()))
    assert error(ours.host.lse, lse) <= 1e-5 * (1 + float(lse.detach().abs().max()))
    for gradient in ours.gradients(leaves, torch.ones(()), None):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("form", ["subcenters", "rotation"])
def test_loss_of_vectors_without_rows(form: str, module: Any, seed: int) -> None:
    tensors = exact_vectors(form, seed)
    ours, leaves = run(module, [tensors[0][:0], *tensors[1:]], torch.empty(0, dtype=torch.int64), "kept")
    assert ours.host.loss.isnan()
    assert ours.host.targets_in_range
    for gradient in ours.gradients(leaves, torch.ones(()), None):
        assert not gradient.any()


@pytest.mark.parametrize("form", ["subcenters", "rotation"])
def test_loss_of_vectors_with_targets_out_of_range(form: str, module: Any, seed: int) -> None:
    tensors = exact_vectors(form, seed)
    for wrong in (-1, 40, 1 << 40):
        target = torch.zeros(12, dtype=torch.int64)
        target[7] = wrong
        ours, leaves = run(module, tensors, target, "recomputed")
        assert not ours.host.targets_in_range
        ours.gradients(leaves, torch.ones(()), None)  # stays within its memory


@pytest.mark.parametrize("form", ["subcenters", "rotation"])
def test_loss_gradients_of_vectors_whose_slots_do_not_exist(form: str, module: Any, seed: int) -> None:
    ours, leaves = run(module, VectorSample(form, 20, 40, 3, 24).tensors(seed), torch.arange(20), "kept")
    ours.host.saved["slots"].fill(255)
    assert all(g.isfinite().all() for g in ours.gradients(leaves, torch.ones(()), None))


def test_loss_of_equal_subcenters_goes_to_the_lowest(module: Any, seed: int) -> None:
    tensors = VectorSample("subcenters", 12, 40, 2, 24).tensors(seed)
    with torch.no_grad():
        tensors[1][:, 1] = tensors[1][:, 0]
        tensors[1][7, 1] = torch.nan  # NaN is the largest
    ours, leaves = run(module, tensors, torch.arange(12) + 10, "kept")
    assert ours.host.lse.isnan().all()
    slots = ours.host.saved["slots"][:, :12]
    assert (slots[7] == 1).all()
    assert not slots[torch.arange(40) != 7].any()
    with torch.no_grad():
        tensors[1][7, 1] = 0
    ours, leaves = run(module, tensors, torch.arange(12) + 10, "kept")
    _, grad_centers, _ = ours.gradients(leaves, torch.ones(()), None)
    assert not grad_centers[torch.arange(40) != 7, 1].any()
    assert grad_centers[:, 0].any(1).sum() >= 39


@pytest.mark.parametrize("form", ["subcenters", "rotation"])
@pytest.mark.parametrize("where", ["kept", "recomputed"])
def test_loss_of_vectors_same_bits_in_any_order_of_threads(
    where: str, form: str, module: Any, seed: int
) -> None:
    sample = VectorSample(form, 70, 67, 4, 40, bf16)
    target, options = make_options(sample, EVERYTHING, seed)  # type: ignore[arg-type]
    tensors = sample.tensors(seed)

    def bits() -> list[Tensor | None]:
        ours, leaves = run(module, tensors, target, where, **options)
        return [ours.host.loss, ours.host.lse, *ours.gradients(leaves, torch.ones(()), torch.ones(70))]

    assert_same_bits_in_any_order(module, seed, bits)
