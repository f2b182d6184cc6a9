"""Cases of the kernel that computes half-precision logits without writing the products; run by test_kernels.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.oracle import Sample, allowed, error, plain, scores

from .host_logits import HostLogits
from .logits_cases import assert_same_bits_in_any_order, check_logits_and_slots
from .logits_storage_cases import with_cancelled_pairs

half, bf16 = torch.float16, torch.bfloat16
# A tile has 64 classes by 128 rows; a step has 32 dims, and f lies in blocks of 64 dims.
SAMPLES = [
    Sample(131, 133, 72, 4, bf16, bf16, bf16),
    Sample(67, 267, 200, 4, half, half, half),
    Sample(259, 70, 40, 7, bf16, bf16, bf16),
    Sample(37, 400, 136, 0, half, half, half),
    Sample(1, 1, 8, 0, bf16, bf16, bf16),
    Sample(3, 65, 256, 1, bf16, bf16, bf16),
]
IDS = [sample.id for sample in SAMPLES]


@pytest.fixture(params=[1, 132])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, module: Any) -> Iterator[Any]:
    """Force the kernel, on one multiprocessor, where a block takes one tile of classes after another, or on many."""
    monkeypatch.setenv("GISTOPS_CUDA_FUSED_LOGITS", "1")
    module.set_multiprocessors(request.param)
    yield module
    module.set_multiprocessors(132)


def launches(module: Any, tensors: list[Tensor], **options: bool) -> dict[str, int]:
    """Return what a forward requests."""
    module.count()
    module.count_only(True)
    try:
        HostLogits(module, tensors, **options)
        return dict(module.count())
    finally:
        module.count_only(False)


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
def test_fused_forward(sample: Sample, kernel: Any, seed: int) -> None:
    tensors = sample.tensors(seed, requires_grad=False)
    requests = launches(kernel, tensors)
    assert (requests["launches"], requests["products"]) == (2, 0)
    kernels = HostLogits(kernel, tensors)
    check_logits_and_slots(kernels, tensors)
    vectors = tensors[1].double()[None] + torch.cat([torch.zeros(1, sample.d), tensors[2].double()])[:, None]
    rnorms = 1 / vectors.norm(dim=2)
    assert error(kernels.center_rnorms, rnorms) <= allowed(0.0, rnorms, torch.float32, 16)


@pytest.mark.parametrize("K", [127, 144])
@pytest.mark.parametrize("dtype", [bf16, half])
@pytest.mark.parametrize("m", range(8))
def test_fused_forward_of_every_number_of_slots(
    m: int, dtype: torch.dtype, K: int, kernel: Any, seed: int
) -> None:
    """Rows of 144 logits and slots are aligned. All variants give the same logits, rounded or not."""
    tensors = Sample(35, K, 104, m, dtype, dtype, dtype).tensors(seed, requires_grad=False)
    kernels = HostLogits(kernel, tensors)
    check_logits_and_slots(kernels, tensors)
    assert (kernels.slots > 0).any() == (m > 0)
    assert torch.equal(HostLogits(kernel, tensors, need_slots=False).logits, kernels.logits)
    for need_slots in (False, True):
        narrow = HostLogits(kernel, tensors, need_slots, narrow=True)
        assert torch.equal(narrow.logits, kernels.logits.to(dtype))
        assert torch.equal(narrow.slots, kernels.slots[: 35 if need_slots else 0])


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("need_slots", [False, True])
@pytest.mark.parametrize("dtype", [bf16, half])
def test_fused_forward_of_cancelled_pairs(
    dtype: torch.dtype, need_slots: bool, narrow: bool, kernel: Any, seed: int
) -> None:
    tensors = with_cancelled_pairs(Sample(135, 144, 72, 3, dtype, dtype, dtype), seed)
    kernels = HostLogits(kernel, tensors, need_slots, narrow)
    wide = [t.detach().double() for t in tensors]
    every = wide[3] * scores(*wide[:3])
    truth, best = every.max(dim=2)
    assert (best[:, 7:40] == 2).any(), "the cancelled slot wins nowhere: the test tests nothing"
    cancelled = kernels.center_rnorms < 0
    assert cancelled[2, 7:40].all()
    assert not cancelled[:, 40:].any()
    assert not cancelled[:, :7].any()
    bound = allowed(error(plain(tensors)[0], truth), truth, dtype if narrow else torch.float32)
    assert error(kernels.logits, truth) <= bound
    if need_slots:
        chosen = every.gather(2, kernels.slots.long()[..., None]).squeeze(2)
        assert error(chosen, truth) <= 2 * bound


@pytest.mark.parametrize("m", [3, 7])
def test_fused_ties_go_to_the_lowest_slot(m: int, kernel: Any, seed: int) -> None:
    tensors = Sample(37, 70, 48, m, bf16, bf16, bf16).tensors(seed, requires_grad=False)
    tensors[2][-1] = tensors[2][0]  # the last displacement repeats the first
    slots = HostLogits(kernel, tensors).slots
    assert slots.max() < m
    assert (slots == 1).any()
    tensors[2].zero_()  # every slot ties
    assert not HostLogits(kernel, tensors).slots.any()


@pytest.mark.parametrize("m", [0, 2, 7])
def test_fused_zero_vectors(m: int, kernel: Any, seed: int) -> None:
    tensors = Sample(6, 70, 24, m, bf16, bf16, bf16).tensors(seed, requires_grad=False)
    tensors[0][2] = 0
    tensors[1][5] = 0
    if m:
        tensors[1][66] = -tensors[2][0]
    expected, _ = plain([t.float() for t in tensors])
    kernels = HostLogits(kernel, tensors)
    torch.testing.assert_close(kernels.logits, expected, atol=2e-5, rtol=1e-5)
    assert not kernels.logits[2].any()


@pytest.mark.parametrize("m", [0, 2, 4, 6, 7])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_fused_non_finite_elements_give_nan(
    argument: int, value: float, m: int, kernel: Any, seed: int
) -> None:
    tensors = Sample(6, 70, 24, m, bf16, bf16, bf16).tensors(seed, requires_grad=False)
    if tensors[argument].numel():
        tensors[argument][1, 3] = value
    expected, _ = plain([t.float() for t in tensors])
    assert expected.isnan().any() == (tensors[argument].numel() > 0)
    kernels = HostLogits(kernel, tensors)
    torch.testing.assert_close(kernels.logits, expected, equal_nan=True, atol=2e-5, rtol=1e-5)
    assert (kernels.slots <= m).all()
    without_slots = HostLogits(kernel, tensors, need_slots=False).logits
    torch.testing.assert_close(without_slots, kernels.logits, equal_nan=True, atol=0, rtol=0)


@pytest.mark.parametrize("argument", [0, 1, 2])
def test_fused_norms_that_overflow_give_nan(argument: int, kernel: Any, seed: int) -> None:
    tensors = Sample(6, 70, 24, 2, bf16, bf16, bf16).tensors(seed, requires_grad=False)
    tensors[argument][1] *= 1e20 / tensors[argument][1].float().norm()
    expected = torch.zeros(6, 70, dtype=torch.bool)
    expected[(slice(1, 2), (slice(None), slice(1, 2)), slice(None))[argument]] = True
    assert torch.equal(HostLogits(kernel, tensors).logits.isnan(), expected)


def test_fused_same_bits_in_any_order_of_threads(kernel: Any, seed: int) -> None:
    tensors = with_cancelled_pairs(Sample(131, 200, 104, 4, bf16, bf16, bf16), seed)

    def bits() -> list[Tensor | None]:
        kernels = HostLogits(kernel, tensors)
        return [kernels.logits, kernels.slots, kernels.center_rnorms, kernels.input_rnorms]

    assert_same_bits_in_any_order(kernel, seed, bits)


def test_fused_logits_in_the_backward(kernel: Any, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    tensors = Sample(131, 133, 72, 4, bf16, bf16, bf16).tensors(seed)
    grad = torch.randn(131, 133, generator=torch.Generator().manual_seed(seed + 1))
    values = HostLogits(kernel, tensors).gradients(grad)
    monkeypatch.delenv("GISTOPS_CUDA_FUSED_LOGITS")
    for value, expected in zip(values, HostLogits(kernel, tensors).gradients(grad), strict=True):
        assert value is not None
        assert expected is not None
        torch.testing.assert_close(value, expected, rtol=2e-2, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("size", "asked", "capability", "fused"),
    [
        ((256, 100_000, 512, 4), "1", 90, True),
        ((256, 100_000, 512, 4), "0", 90, False),
        ((256, 100_000, 512, 4), None, 90, False),
        ((256, 100_000, 512, 4), "1", 80, False),
        ((256, 100_000, 512, 8), "1", 90, False),  # nine slots
        ((256, 100_000, 500, 4), "1", 90, False),  # rows that are not aligned
        ((256, 100_000, 768, 4), "1", 90, False),  # no room for f
        ((256, 8142, 512, 4), "1", 90, True),
    ],
)
def test_fused_where_it_is_asked_for_and_possible(
    size: tuple[int, int, int, int],
    asked: str | None,
    capability: int,
    fused: bool,
    module: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "GISTOPS_CUDA_FUSED_LOGITS"
    monkeypatch.delenv(name, raising=False) if asked is None else monkeypatch.setenv(name, asked)
    B, K, d, m = size
    tensors = [*(torch.empty(rows, d, dtype=bf16) for rows in (B, K, m)), torch.ones(())]
    module.set_compute_capability(capability)
    try:
        requests = launches(module, tensors, narrow=True)
    finally:
        module.set_compute_capability(90)
    assert (requests["products"] == 0) == fused
    assert (requests["bytes"] <= 0.01 * B * K * 4) == fused
