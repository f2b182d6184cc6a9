"""Cases of the host-compiled logits without slots, and in the operands' type; run by test_kernels.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.oracle import (
    Sample,
    allowed,
    allowed_of_tau,
    error,
    errors_of_rounded_logits,
    gradients,
    leaves,
    routed,
)

from .host_logits import HostLogits
from .logits_cases import check_logits_and_slots

half, bf16, f64 = torch.float16, torch.bfloat16, torch.float64
NARROW = [
    Sample(70, 133, 136, 4, bf16, bf16, bf16),
    Sample(261, 66, 72, 4, bf16, bf16, bf16),
    Sample(33, 70, 16, 0, bf16, bf16, bf16),
    Sample(40, 70, 40, 13, bf16, bf16, bf16),
    Sample(70, 129, 69, 4, half, half, half),
]
IDS = [sample.id for sample in NARROW]


def with_cancelled_pairs(sample: Sample, seed: int) -> list[Tensor]:
    tensors = sample.tensors(seed)
    with torch.no_grad():
        tensors[1][7:40] = -tensors[2][1] + 1e-3 * tensors[1][7:40]
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, bf16, half, f64])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("m", [4, 12])
def test_forward_without_slots(dtype: torch.dtype, narrow: bool, m: int, module: Any, seed: int) -> None:
    tensors = with_cancelled_pairs(Sample(137, 70, 24, m, dtype, dtype, dtype), seed)
    with_slots = HostLogits(module, tensors, narrow=narrow)
    kernels = HostLogits(module, tensors, need_slots=False, narrow=narrow)
    assert (with_slots.slots[:, 7:40] == 2).any(), "the cancelled slot wins nowhere: the test tests nothing"
    assert kernels.slots.shape[0] == 0
    assert torch.equal(kernels.logits, with_slots.logits)
    assert torch.equal(kernels.center_rnorms, with_slots.center_rnorms)


@pytest.mark.parametrize("dtype", [torch.float32, bf16, f64])
@pytest.mark.parametrize("m", range(13))
def test_forward_of_every_number_of_slots(m: int, dtype: torch.dtype, module: Any, seed: int) -> None:
    """There are several variants of the kernel, by the number of slots and by the results."""
    tensors = Sample(37, 131, 24, m, dtype, dtype, dtype).tensors(seed, requires_grad=False)
    kernels = HostLogits(module, tensors)
    check_logits_and_slots(kernels, tensors)
    assert torch.equal(HostLogits(module, tensors, need_slots=False).logits, kernels.logits)
    for need_slots in (False, True):
        narrow = HostLogits(module, tensors, need_slots, narrow=True)
        assert torch.equal(narrow.logits, kernels.logits.to(narrow.logits.dtype))


@pytest.mark.parametrize("m", [0, 2, 6, 11])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_forward_of_non_finite_elements_without_slots(
    argument: int, value: float, m: int, module: Any, seed: int
) -> None:
    tensors = Sample(6, 40, 19, m).tensors(seed, requires_grad=False)
    if tensors[argument].numel():
        tensors[argument][1, 3] = value
    expected = HostLogits(module, tensors).logits
    assert expected.isnan().any() == (tensors[argument].numel() > 0)
    without_slots = HostLogits(module, tensors, need_slots=False).logits
    torch.testing.assert_close(without_slots, expected, equal_nan=True, atol=0, rtol=0)


@pytest.mark.parametrize("sample", NARROW, ids=IDS)
def test_forward_in_the_type_of_the_operands(sample: Sample, module: Any, seed: int) -> None:
    tensors = sample.tensors(seed)
    wide, narrow = HostLogits(module, tensors), HostLogits(module, tensors, narrow=True)
    assert narrow.logits.dtype == sample.input
    assert torch.equal(narrow.logits, wide.logits.to(sample.input))
    assert torch.equal(narrow.slots, wide.slots)


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("sample", NARROW, ids=IDS)
def test_gradients_from_rounded_logits(sample: Sample, cancelled: bool, module: Any, seed: int) -> None:
    cancelled = cancelled and sample.m > 0
    tensors = with_cancelled_pairs(sample, seed) if cancelled else sample.tensors(seed)
    grad = torch.randn(sample.B, sample.K, generator=torch.Generator().manual_seed(seed + 1))
    grad = (grad / 64).to(sample.input)  # the gradients of cancelled pairs must not overflow float16
    kernels = HostLogits(module, tensors, narrow=True)
    assert bool((kernels.center_rnorms < 0).any()) >= cancelled
    wide = leaves(tensors, f64)
    truth = gradients(lambda *t: routed(*t, kernels.slots), wide, grad.double())
    rounded = errors_of_rounded_logits(wide, kernels.slots, kernels.logits, grad)
    for name, value, true, more in zip(
        ("input", "centers", "displacements", "tau"), kernels.gradients(grad), truth, rounded, strict=True
    ):
        assert value is not None
        bound = allowed(
            0.0, true, sample.input, sample.B * sample.K if cancelled else max(sample.B, sample.K)
        )
        if name == "tau":
            bound = allowed_of_tau(grad, kernels.logits, tensors[3], true, torch.float32)
        assert error(value, true) <= bound + more, name


def test_gradients_in_steps_of_classes(module: Any, seed: int) -> None:
    """The gradient of the centers reads the narrow gradient of cancelled pairs of every chunk."""
    tensors = with_cancelled_pairs(Sample(70, 333, 69, 4, bf16, bf16, bf16), seed)
    with torch.no_grad():
        tensors[1][300:320] = -tensors[2][1] + 1e-3 * tensors[1][300:320]
    grad = torch.randn(70, 333, generator=torch.Generator().manual_seed(seed)).to(bf16)
    whole = HostLogits(module, tensors, narrow=True)
    expected = whole.gradients(grad)
    module.set_limits(3200, 3200)
    try:
        parts = HostLogits(module, tensors, narrow=True)
        assert torch.equal(parts.logits, whole.logits)
        for value, other in zip(parts.gradients(grad), expected, strict=True):
            assert value is not None
            assert other is not None
            torch.testing.assert_close(value, other, rtol=2e-2, atol=1e-2 * float(other.abs().max()))
    finally:
        module.reset_limits()
