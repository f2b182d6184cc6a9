"""Cases of the host-compiled top-k against the logits of the same kernels; run by test_kernels.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.oracle import Sample
from tests.ops.test_topk import INFINITE_SCORES

from .host_logits import HostLogits
from .host_topk import HostTopk
from .logits_cases import assert_same_bits_in_any_order

half, bf16, f64 = torch.float16, torch.bfloat16, torch.float64
#: Tiles have 128 classes by 32 rows, or 16 rows in float64. k: one, several, all, the most; 64 and 65 end a capacity.
TOPK_CASES = [
    (Sample(70, 333, 40, 4), 10),
    (Sample(33, 1100, 12, 3), 128),
    (Sample(5, 130, 3, 9, spread=1.0), 65),
    (Sample(33, 70, 16, 0), 70),
    (Sample(1, 1, 1, 0), 1),
    (Sample(1, 4000, 8, 2), 5),
    (Sample(4, 70, 33, 255), 1),
    (Sample(35, 129, 40, 4, f64, f64, f64), 64),
    (Sample(70, 133, 136, 4, bf16, bf16, bf16), 33),
    (Sample(65, 129, 41, 4, half, half, half), 32),
    (Sample(37, 129, 40, 4, bf16, torch.float32, torch.float32), 5),
]


def best_of(logits: Tensor, k: int) -> Tensor:
    """Return the classes of the k largest logits: NaN first, ties by the lower class."""
    return logits.sort(dim=1, descending=True, stable=True).indices[:, :k]


def assert_best_of_logits(module: Any, tensors: list[Tensor], k: int, bias: Tensor | None) -> HostTopk:
    """Check top-k against the logits of the same kernels, bit by bit, and the log-sum-exp with a tolerance."""
    kernels, found = HostLogits(module, tensors), HostTopk(module, tensors, k, bias)
    logits = kernels.logits if bias is None else kernels.logits + bias.to(kernels.sums)
    expected = best_of(logits, k)
    assert torch.equal(found.classes, expected)
    assert found.values.dtype == kernels.sums
    torch.testing.assert_close(found.values, logits.gather(1, expected), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.slots, kernels.slots.gather(1, expected))
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if kernels.sums == f64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.lse, logits.logsumexp(1), equal_nan=True, **tolerance)
    return found


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("sample", "k"), TOPK_CASES, ids=[f"{s.id}-{k}" for s, k in TOPK_CASES])
def test_topk_has_the_bits_of_the_logits(
    sample: Sample, k: int, biased: bool, module: Any, seed: int
) -> None:
    bias = torch.randn(sample.K, generator=torch.Generator().manual_seed(seed)) if biased else None
    assert_best_of_logits(module, sample.tensors(seed, requires_grad=False), k, bias)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_topk_of_ties_takes_the_lower_class(dtype: torch.dtype, module: Any, seed: int) -> None:
    """Scores of few values and zeros of both signs tie, across lanes, tiles, ranges and chunks."""
    K = 1500
    bias = torch.randint(-1, 3, (K,), generator=torch.Generator().manual_seed(seed)).to(dtype)
    bias[::2] *= -1
    x, w, delta = torch.zeros(3, 4), torch.ones(K, 4), torch.empty(0, 4)
    tensors = [t.to(dtype) for t in (x, w, delta, torch.tensor(1.0))]
    module.set_limits(256 * 16, 1 << 25)
    try:
        for k in (1, 31, 128):
            found = HostTopk(module, tensors, k, bias)
            expected = best_of(bias.expand(3, K), k)
            assert torch.equal(found.classes, expected)
            assert torch.equal(found.values, bias[expected])
    finally:
        module.reset_limits()


def test_topk_of_sorted_scores(module: Any) -> None:
    """Ascending scores replace a candidate at every class, descending scores never."""
    K = 1300
    tensors = [torch.zeros(2, 4), torch.ones(K, 4), torch.empty(0, 4), torch.tensor(1.0)]
    for bias in (torch.arange(K).float(), -torch.arange(K).float()):
        for k in (10, 100):
            found = HostTopk(module, tensors, k, bias, need_lse=False)
            assert torch.equal(found.classes, best_of(bias.expand(2, K), k))
            assert found.lse.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_topk_takes_nan_first_and_minus_infinity_last(dtype: torch.dtype, module: Any) -> None:
    bias = torch.full((900,), -torch.inf)
    bias[[400, 20, 800, 3]] = torch.tensor([torch.nan, torch.inf, -torch.nan, -2.0])
    tensors = [torch.zeros(3, 8), torch.ones(900, 8), torch.empty(0, 8), torch.tensor(1.0)]
    tensors = [t.to(dtype) for t in tensors]
    found = HostTopk(module, tensors, 6, bias)
    assert found.classes.tolist() == [[400, 800, 20, 3, 0, 1]] * 3
    assert found.values[:, :2].isnan().all()
    assert found.values[0, 2:].tolist() == [torch.inf, -2.0, -torch.inf, -torch.inf]
    bias.fill_(-torch.inf)
    assert HostTopk(module, tensors, 3, bias).classes.tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_topk_log_sum_exp_of_infinite_scores(dtype: torch.dtype, module: Any, seed: int) -> None:
    """The log-sum-exp is that of `torch.logsumexp`, across lanes, ranges and chunks."""
    source = torch.Generator().manual_seed(seed)
    tensors = [torch.zeros(3, 4), torch.ones(1100, 4), torch.empty(0, 4), torch.tensor(1.0)]
    tensors = [t.to(dtype) for t in tensors]
    for special in INFINITE_SCORES:
        bias = torch.randn(1100, generator=source, dtype=dtype)
        bias[list(special)] = torch.tensor(list(special.values()), dtype=dtype)
        for limit in (1 << 22, 256 * 16):
            module.set_limits(limit, 1 << 25)
            try:
                lse = HostTopk(module, tensors, 2, bias).lse
            finally:
                module.reset_limits()
            torch.testing.assert_close(lse, bias.logsumexp(0).expand(3), equal_nan=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_topk_of_non_finite_elements(value: float, module: Any, seed: int) -> None:
    tensors = Sample(6, 300, 19, 2).tensors(seed, requires_grad=False)
    tensors[0][1, 3] = value
    tensors[1][200, 3] = value
    assert_best_of_logits(module, tensors, 5, None)


@pytest.mark.parametrize("dtype", [torch.float32, bf16, f64])
def test_topk_of_centers_that_a_displacement_nearly_cancels(
    dtype: torch.dtype, module: Any, seed: int
) -> None:
    tensors = Sample(37, 200, 24, 3, dtype, dtype, dtype).tensors(seed, requires_grad=False)
    tensors[1][7:150] = -tensors[2][1] + 1e-3 * tensors[1][7:150]
    found = assert_best_of_logits(module, tensors, 20, None)
    assert (found.slots == 2).any(), "the cancelled slot wins nowhere: the test tests nothing"


@pytest.mark.parametrize("dtype", [torch.float32, bf16])
def test_topk_in_chunks_of_classes(dtype: torch.dtype, module: Any, seed: int) -> None:
    """A chunk takes three launches and no more memory: neither grows with the number of classes otherwise."""
    few, many = (
        Sample(40, K, 16, 4, dtype, dtype, dtype).tensors(seed, requires_grad=False) for K in (800, 1400)
    )
    whole = assert_best_of_logits(module, many, 10, None)
    assert whole.launches == 4
    module.set_limits(256 * 48 // 2, 1 << 25)  # 256 classes of 40 rows, padded to 48
    try:
        parts = assert_best_of_logits(module, many, 10, None)
        assert parts.launches == 3 * 6 + 1
        assert HostTopk(module, few, 10).scratch_bytes == parts.scratch_bytes
        assert parts.scratch_bytes < 40 * 1400 * 4
    finally:
        module.reset_limits()
    for a, b in zip(parts.outputs[:3], whole.outputs[:3], strict=True):
        assert torch.equal(a, b)


def test_topk_memory_of_partial_results(module: Any, seed: int) -> None:
    """The lists of all ranges take a quarter of the logits at most, beside the products of a chunk."""
    tensors = Sample(64, 1280, 4, 0).tensors(seed, requires_grad=False)
    chunk = 1280 * 64 * 5 + 1280 * 4  # products, slots and norms
    for k in (1, 10, 128):
        assert HostTopk(module, tensors, k).scratch_bytes - chunk <= 64 * 1280 * 4 * (0.25 + 0.1)


def test_topk_of_no_rows(module: Any, seed: int) -> None:
    found = HostTopk(module, Sample(0, 40, 7, 2).tensors(seed, requires_grad=False), 3)
    assert [t.shape for t in found.outputs] == [(0, 3), (0, 3), (0, 3), (0,)]
    assert found.launches == 0


def test_topk_has_the_same_bits_in_any_order_of_threads(module: Any, seed: int) -> None:
    """The results do not depend on the order of a block's threads, so no barrier is missing."""
    tensors = Sample(37, 700, 24, 4, bf16, bf16, bf16).tensors(seed, requires_grad=False)
    bias = torch.randn(700, generator=torch.Generator().manual_seed(seed))
    assert_same_bits_in_any_order(module, seed, lambda: [*HostTopk(module, tensors, 40, bias).outputs])
