"""The logits without slots, and in the dtype of input. Run by test_interpreter.py."""

from __future__ import annotations

import pytest
import torch

import gistops
from tests.ops import test_logits_dtype as narrow
from tests.ops import test_slots_off as slots_off
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

from .conftest import INTERPRETED

if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1; test_interpreter.py runs this file", allow_module_level=True)

bf16, half, f32 = torch.bfloat16, torch.float16, torch.float32
SAMPLES = [
    Sample(37, 53, 21, 4, bf16, bf16, bf16),
    Sample(19, 35, 33, 12, half, half, half),
    Sample(9, 20, 16, 0, bf16, bf16, bf16),
    Sample(9, 20, 16, 2, half, f32, bf16),
]
IDS = [sample.id for sample in SAMPLES]
PRODUCTS = ["cublas", "fused"]


@pytest.fixture(params=PRODUCTS)
def product(request: pytest.FixtureRequest) -> str:
    """The kernels of each way to compute W f'."""
    return str(request.param)


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
@pytest.mark.parametrize("tiles", ["small"], indirect=True)
def test_narrow_logits_are_the_wide_logits_rounded_once(
    sample: Sample, product: str, tiles: str, seed: int
) -> None:
    from gistops.backends.triton import configs

    with configs.forced(product=product):
        for return_slots in (False, True):
            narrow.test_narrow_logits_are_the_wide_logits_rounded_once(sample, return_slots, "triton", seed)


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
@pytest.mark.parametrize("tiles", ["small"], indirect=True)
def test_gradients(sample: Sample, tiles: str, seed: int) -> None:
    narrow.test_gradients(sample, "triton", seed)


@pytest.mark.parametrize("m", [2, 12])
def test_narrow_gradients_of_cancelled_pairs(m: int, seed: int) -> None:
    tensors = Sample(5, 20, 21, m, bf16, bf16, bf16).tensors(seed)
    with torch.no_grad():
        tensors[1][7:9] = -tensors[2][1] + 1e-3 * tensors[1][7:9]
        tensors[0][0] = tensors[1][7] + tensors[2][1]  # so that slot 2 of class 7 wins in row 0
    logits, slots = gistops.constellation_logits(
        *tensors, return_slots=True, logits_dtype=bf16, backend="triton"
    )
    assert slots[0, 7] == 2
    grad = torch.randn(5, 20).to(bf16)
    wide = leaves(tensors, torch.float64)
    truth = gradients(lambda *t: routed(*t, slots), wide, grad.double())
    rounded = errors_of_rounded_logits(wide, slots, logits, grad)
    bounds = [allowed(0.0, true, bf16, 5 * 20) for true in truth[:3]]
    bounds.append(allowed_of_tau(grad, logits, tensors[3], truth[3], f32))
    for value, true, bound, more in zip(
        torch.autograd.grad(logits, tensors, grad), truth, bounds, rounded, strict=True
    ):
        assert error(value, true) <= bound + more


@pytest.mark.parametrize("transform", ["subcenters", "rotation"])
def test_chunked_transforms(transform: str, seed: int) -> None:
    narrow.test_every_transform(transform, "triton", seed)


def test_chunked_transforms_without_slots(seed: int) -> None:
    slots_off.test_slots_that_nobody_can_ask_for("subcenters", "triton", seed)


@pytest.mark.parametrize("tiles", ["small"], indirect=True)
def test_without_slots(product: str, tiles: str, seed: int) -> None:
    from gistops.backends.triton import configs

    tensors = Sample(19, 35, 20, 4).tensors(seed, requires_grad=False)
    tensors[1][7:9] = -tensors[2][1] + 1e-3 * tensors[1][7:9]
    with configs.forced(product=product):
        logits, _ = gistops.constellation_logits(*tensors, return_slots=True, backend="triton")
        with slots_off.Slots() as slots:
            assert torch.equal(gistops.constellation_logits(*tensors, backend="triton"), logits)
    assert slots.shapes == [[0]]


def test_opcheck_and_calls_of_earlier_programs(seed: int) -> None:
    assert gistops.backends.choose("cpu", "triton") == "triton"  # which defines the ops
    forward = torch.ops.gistops_triton.logits_forward.default
    tensors = Sample(5, 7, 3, 2, half, half, half).tensors(seed)
    torch.library.opcheck(forward, (*(t.detach() for t in tensors), False, False, half))
    assert forward(*tensors, False)[1].shape == (5, 7)
    with pytest.raises(RuntimeError, match="need_slots: expected True"):
        forward(*tensors, False, False)[0].sum().backward()
