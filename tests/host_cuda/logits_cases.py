"""Cases of the host-compiled logits against the definition in float64; run by test_kernels.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.oracle import Sample, allowed, allowed_of_tau, error, gradients, leaves, plain, routed, scores

from .host_logits import HostLogits

half, bf16, f64 = torch.float16, torch.bfloat16, torch.float64
# Tiles have 32, 64 or 128 classes by 128, 64 or 32 rows; those of the gradient of the centers are in
# grad_centers_cases.py.
SAMPLES = [
    Sample(70, 133, 69, 4),
    Sample(130, 67, 200, 4),
    Sample(5, 130, 3, 9, spread=1.0),
    Sample(33, 70, 16, 0),
    Sample(1, 1, 1, 0),
    Sample(4, 70, 33, 255),
    Sample(70, 133, 72, 4),
    Sample(261, 66, 40, 3),
    Sample(67, 129, 40, 4, f64, f64, f64),
    Sample(70, 133, 136, 4, bf16, bf16, bf16),
    Sample(140, 80, 201, 8, bf16, bf16, bf16),
    Sample(261, 66, 72, 4, bf16, bf16, bf16),
    Sample(40, 70, 40, 13, bf16, bf16, bf16),
    Sample(70, 129, 72, 4, half, half, half),
    Sample(67, 129, 40, 4, bf16, torch.float32, torch.float32),
    Sample(40, 65, 40, 3, torch.float32, f64, torch.float32),
]
IDS = [sample.id for sample in SAMPLES]


def of_few_elements(vectors: Tensor, tau: Tensor, grads: list[Tensor]) -> float:
    """Return a bound for the gradient of vectors of few elements: terms along the vector cancel, and little else may be left."""
    sizes = tau.detach().abs() / vectors.detach().abs().min() * sum(g.abs().sum() for g in grads)
    return 16 * torch.finfo(torch.float32).eps * float(sizes)


def check_logits_and_slots(kernels: HostLogits, tensors: list[Tensor]) -> None:
    wide = [t.double() for t in tensors]
    every = wide[3] * scores(*wide[:3])
    truth = every.max(dim=2).values
    # Products of half-precision operands are exact and summed in float32, as in plain PyTorch with float32 operands.
    bound = allowed(error(plain(tensors)[0], truth), truth, kernels.sums)
    assert error(kernels.logits, truth) <= bound
    assert error(every.gather(2, kernels.slots.long()[..., None]).squeeze(2), truth) <= 2 * bound


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
def test_forward(sample: Sample, module: Any, seed: int) -> None:
    tensors = sample.tensors(seed, requires_grad=False)
    kernels = HostLogits(module, tensors)
    check_logits_and_slots(kernels, tensors)
    wide = [t.double() for t in tensors]
    vectors = wide[1][None] + F.pad(wide[2], (0, 0, 1, 0))[:, None]
    rnorms = 1 / vectors.norm(dim=2)
    assert error(kernels.center_rnorms.abs(), rnorms) <= allowed(0.0, rnorms, kernels.sums, 16)
    assert error(kernels.input_rnorms, 1 / wide[0].norm(dim=1)) <= allowed(
        0.0, 1 / wide[0].norm(dim=1), kernels.sums
    )


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
def test_gradients(sample: Sample, module: Any, seed: int) -> None:
    tensors = sample.tensors(seed)
    grad = torch.randn(sample.B, sample.K, generator=torch.Generator().manual_seed(seed + 1))
    kernels = HostLogits(module, tensors)
    ours = kernels.gradients(grad)
    truth = gradients(lambda *t: routed(*t, kernels.slots), leaves(tensors, torch.float64), grad)
    for name, tensor, value, true in zip(
        ("input", "centers", "displacements", "tau"), tensors, ours, truth, strict=True
    ):
        assert value is not None
        assert value.dtype == tensor.dtype
        # H is rounded to the operands' type, as the gradient of the logits of a linear layer is.
        roundings = max((kernels.operands, tensor.dtype), key=lambda dtype: torch.finfo(dtype).eps)
        bound = allowed(0.0, true, roundings, max(sample.B, sample.K))
        if name == "tau":
            bound = allowed_of_tau(grad, kernels.logits, tensor, true, torch.float32)
        elif sample.d == 1 and tensor.numel():
            bound = max(bound, of_few_elements(tensor, tensors[3], [grad]))
        assert error(value, true) <= bound, name


@pytest.mark.parametrize("dtype", [torch.float32, bf16, f64])
@pytest.mark.parametrize("closeness", [1e-1, 1e-3])
def test_centers_that_a_displacement_nearly_cancels(
    closeness: float, dtype: torch.dtype, module: Any, seed: int
) -> None:
    tensors = Sample(37, 129, 24, 3, dtype, dtype, dtype).tensors(seed)
    with torch.no_grad():
        tensors[1][7:90] = -tensors[2][1] + closeness * tensors[1][7:90]
    grad = torch.randn(37, 129, generator=torch.Generator().manual_seed(seed + 1))
    kernels = HostLogits(module, tensors)
    wide = leaves(tensors, torch.float64)
    truth = (wide[3] * scores(*wide[:3])).max(dim=2).values
    assert (kernels.slots[:, 7:90] == 2).any(), "the cancelled slot wins nowhere: the test tests nothing"
    assert (kernels.center_rnorms < 0).any()
    assert error(kernels.logits, truth) <= allowed(error(plain(tensors)[0], truth), truth, kernels.sums)
    expected = gradients(lambda *t: routed(*t, kernels.slots), wide, grad)
    bounds = [allowed(0.0, true, dtype, 37 * 129) for true in expected]
    bounds[3] = allowed_of_tau(grad, kernels.logits, tensors[3], expected[3], torch.float32)
    for value, true, bound in zip(kernels.gradients(grad), expected, bounds, strict=True):
        assert value is not None
        assert error(value, true) <= bound


@pytest.mark.parametrize("m", [2, 12])
def test_gradients_of_slots_that_do_not_exist(m: int, module: Any, seed: int) -> None:
    """Slots from a caller stay within the memory of the norms: the sanitizers would find a read beyond it."""
    kernels = HostLogits(module, Sample(20, 40, 24, m).tensors(seed, requires_grad=False))
    kernels.slots.fill_(255)
    assert all(g.isfinite().all() for g in kernels.gradients(torch.ones(20, 40)))


def test_cancelled_pairs_are_found_in_every_group_of_classes(module: Any, seed: int) -> None:
    tensors = Sample(3, 16500, 8, 2).tensors(seed)
    cancelled = [0, 70, 9000, 16499]
    with torch.no_grad():
        tensors[1][cancelled] = -tensors[2][1] + 1e-3 * tensors[1][cancelled]
        tensors[0][0] = tensors[1][70] + tensors[2][1]  # so that slot 2 of class 70 wins in row 0
    kernels = HostLogits(module, tensors)
    assert (kernels.center_rnorms < 0).sum() >= len(cancelled)
    slots = kernels.slots
    assert (slots[:, cancelled] == 2).any(), "the cancelled slots win nowhere: the test tests nothing"
    grad = torch.zeros(3, 16500)
    grad[:, cancelled] = torch.randn(3, len(cancelled), generator=torch.Generator().manual_seed(seed + 1))
    truth = gradients(lambda *t: routed(*t, slots), leaves(tensors, torch.float64), grad)
    for value, true in zip(kernels.gradients(grad)[:3], truth[:3], strict=True):
        assert value is not None
        assert error(value, true) <= allowed(0.0, true, torch.float32, 3 * len(cancelled))


@pytest.mark.parametrize("dtype", [bf16, half])
def test_gradient_of_displacements_is_not_rounded_with_the_weights(
    dtype: torch.dtype, module: Any, seed: int
) -> None:
    tensors = Sample(70, 133, 72, 4, dtype, dtype, dtype).tensors(seed)
    grad = torch.randn(70, 133, generator=torch.Generator().manual_seed(seed + 1))
    kernels = HostLogits(module, tensors)
    true = gradients(lambda *t: routed(*t, kernels.slots), leaves(tensors, torch.float64), grad)[2]
    value = torch.from_numpy(
        module.logits_backward(
            kernels.type, grad.numpy(), *kernels.arrays, *kernels.saved, False, False, True, False, False
        )[2]
    )
    assert value.dtype == torch.float32
    assert error(value, true) <= allowed(0.0, true, torch.float32, 70 * 133)


@pytest.mark.parametrize("m", [3, 12])
def test_ties_go_to_the_lowest_slot(m: int, module: Any, seed: int) -> None:
    tensors = Sample(37, 70, 45, m).tensors(seed, requires_grad=False)
    tensors[2][-1] = tensors[2][0]  # the last displacement repeats the first
    assert HostLogits(module, tensors).slots.max() < m
    tensors[2].zero_()  # every slot ties
    kernels = HostLogits(module, tensors)
    assert not kernels.slots.any()
    torch.testing.assert_close(
        kernels.logits, tensors[3] * F.normalize(tensors[0]) @ F.normalize(tensors[1]).T
    )


@pytest.mark.parametrize("m", [2, 11])
def test_zero_vectors(m: int, module: Any, seed: int) -> None:
    tensors = Sample(6, 40, 19, m).tensors(seed)
    with torch.no_grad():
        tensors[0][2] = 0
        tensors[1][5] = 0
        tensors[1][9] = -tensors[2][0]
    kernels = HostLogits(module, tensors)
    expected, slots = plain(tensors)
    torch.testing.assert_close(kernels.logits, expected.detach(), atol=2e-5, rtol=1e-5)
    assert torch.equal(kernels.slots, slots)
    assert not kernels.logits[2].any()
    grad = torch.randn(6, 40, generator=torch.Generator().manual_seed(seed))
    grad[:, 5] = grad[:, 9] = 0  # the gradient of a clamped norm is 1e12 times the others
    for value, true in zip(
        kernels.gradients(grad), torch.autograd.grad(expected, tensors, grad), strict=True
    ):
        assert value is not None
        torch.testing.assert_close(value, true, atol=float(true.abs().max()) * 1e-5, rtol=1e-4)
    grad.fill_(1.0)
    for gradient in kernels.gradients(grad):
        assert gradient is not None
        assert gradient.isfinite().all()


@pytest.mark.parametrize("m", [2, 11])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_non_finite_elements_give_nan_where_they_are_used(
    argument: int, value: float, m: int, module: Any, seed: int
) -> None:
    tensors = Sample(6, 40, 19, m).tensors(seed, requires_grad=False)
    tensors[argument][1, 3] = value
    kernels = HostLogits(module, tensors)
    expected, _ = plain(tensors)
    torch.testing.assert_close(kernels.logits, expected, equal_nan=True, atol=2e-5, rtol=1e-5)
    assert (kernels.slots <= m).all()
    kernels.gradients(torch.randn(6, 40))


@pytest.mark.parametrize("m", [2, 11])
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_norms_that_overflow_give_nan(argument: int, m: int, module: Any, seed: int) -> None:
    tensors = Sample(6, 40, 19, m).tensors(seed, requires_grad=False)
    tensors[argument][1] *= 1e20 / tensors[argument][1].norm()
    expected = torch.zeros(6, 40, dtype=torch.bool)
    expected[(slice(1, 2), (slice(None), slice(1, 2)), slice(None))[argument]] = True
    assert torch.equal(HostLogits(module, tensors).logits.isnan(), expected)


@pytest.mark.parametrize("tau", [0.0, 1e-44, -1e-44])
def test_gradient_of_a_tiny_tau(tau: float, module: Any, seed: int) -> None:
    """It is the sum of gradient times cosine, even where tau times a cosine is zero."""
    tensors = [*Sample(14, 70, 33, 3).tensors(seed)[:3], torch.tensor(tau, requires_grad=True)]
    kernels = HostLogits(module, tensors)
    assert kernels.logits.abs().max() <= 1e-19
    grad = torch.randn(14, 70, generator=torch.Generator().manual_seed(seed))
    value = kernels.gradients(grad)[3]
    true = (grad.double() * scores(*(t.double() for t in tensors[:3])).max(dim=2).values).sum()
    assert value is not None
    assert error(value, true) <= 1e-5 * float(grad.abs().sum())


@pytest.mark.parametrize(("B", "K", "m"), [(0, 5, 2), (3, 0, 2), (0, 0, 0)])
def test_empty(B: int, K: int, m: int, module: Any, seed: int) -> None:
    kernels = HostLogits(module, Sample(B, K, 7, m).tensors(seed))
    assert kernels.logits.shape == kernels.slots.shape == (B, K)
    for gradient in kernels.gradients(torch.zeros(B, K)):
        assert gradient is not None
        assert not gradient.any()


@pytest.mark.parametrize("missing", [0, 1, 2, 3, None])
def test_only_requested_gradients_are_computed(missing: int | None, module: Any, seed: int) -> None:
    kernels = HostLogits(module, Sample(20, 70, 21, 4).tensors(seed))
    grad = torch.randn(20, 70, generator=torch.Generator().manual_seed(seed))
    every = kernels.gradients(grad)
    needs = [index != missing if missing is not None else index == 1 for index in range(4)]
    requested = kernels.gradients(grad, (needs[0], needs[1], needs[2], needs[3]))
    for needed, value, expected in zip(needs, requested, every, strict=True):
        assert (value is not None) == needed
        if value is not None and expected is not None:
            assert torch.equal(value, expected)


def assert_same_bits_in_any_order(module: Any, seed: int, bits: Callable[[], list[Tensor | None]]) -> None:
    """Check that results do not depend on the order in which a block's threads run."""
    first = bits()
    for order in ("reverse", "shuffled"):
        module.set_thread_order(order, seed % 1000)
        try:
            for value, expected in zip(bits(), first, strict=True):
                assert value is not None
                assert expected is not None
                assert torch.equal(value, expected), order
        finally:
            module.set_thread_order("forward", 0)


def test_same_bits_in_any_order_of_threads(module: Any, seed: int) -> None:
    """The results do not depend on the order of a block's threads, so no barrier is missing."""
    tensors = Sample(70, 133, 72, 4, bf16, bf16, bf16).tensors(seed)
    grad = torch.randn(70, 133, generator=torch.Generator().manual_seed(seed))

    def bits() -> list[Tensor | None]:
        kernels = HostLogits(module, tensors)
        return [kernels.logits, kernels.slots, kernels.center_rnorms, *kernels.gradients(grad)]

    assert_same_bits_in_any_order(module, seed, bits)


@pytest.mark.parametrize("dtype", [torch.float32, bf16])
def test_gradients_in_chunks_of_classes(dtype: torch.dtype, module: Any, seed: int) -> None:
    """Large problems are computed in chunks of classes, with the same results."""
    tensors = Sample(70, 333, 69, 4, dtype, dtype, dtype).tensors(seed)
    grad = torch.randn(70, 333, generator=torch.Generator().manual_seed(seed))
    whole = HostLogits(module, tensors)
    expected = whole.gradients(grad)
    module.set_limits(3200, 3200)
    try:
        parts = HostLogits(module, tensors)
        assert torch.equal(parts.logits, whole.logits)
        for value, other in zip(parts.gradients(grad), expected, strict=True):
            assert value is not None
            assert other is not None
            torch.testing.assert_close(value, other, rtol=2e-2 if dtype == bf16 else 1e-4, atol=1e-2)
    finally:
        module.reset_limits()
