"""The top k classes without logits [B, K]."""

from __future__ import annotations

import time
from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor

import gistops
from gistops import backends
from gistops._classifier import Classifier
from gistops.functional.logits import center_norms
from gistops.functional.topk import local_topk
from gistops.operators.topk import Topk, can_fuse

from .oracle import SAMPLES, Sample, allowed, error, generator, plain, scores

Case = tuple[Sample, int]
#: k: one, several, more than a block of classes (512), all.
CASES: list[Case] = [
    (s, k) for s, k in zip(SAMPLES, (10, 3, 600, 67, 1, 130, 7, 1, 33, 5, 5, 5, 5, 5, 5), strict=True)
]


@pytest.mark.parametrize("case", CASES, ids=[f"{s.id}-{k}" for s, k in CASES])
@pytest.mark.parametrize("biased", [False, True])
def test_values_classes_slots_and_lse(case: Case, biased: bool, backend: str, seed: int) -> None:
    sample, k = case
    bias = torch.randn(sample.K) if biased else None
    check_against_float64(sample.tensors(seed, requires_grad=False), k, bias, backend)


def check_against_float64(tensors: list[Tensor], k: int, bias: Tensor | None, backend: str) -> list[Tensor]:
    """Check all outputs of a call against the definition, and return them."""
    values, classes, slots, lse = gistops.constellation_topk(
        *tensors, k, class_bias=bias, return_lse=True, backend=backend
    )
    wide = [t.double() for t in tensors]
    every = wide[3] * scores(*wide[:3])
    truth = every.max(dim=2).values
    logits = plain(tensors)[0]
    if bias is not None:
        truth, every = truth + bias.double(), every + bias.double()[:, None]
        logits = logits + bias
    limit = allowed(error(logits, truth), truth, values.dtype)
    assert values.shape == classes.shape == slots.shape == (len(tensors[0]), k)
    assert (classes.dtype, slots.dtype) == (torch.int64, torch.uint8)
    assert values.dtype == lse.dtype == gistops.constellation_logits(*tensors, backend=backend).dtype
    # The values are the largest in order; classes and slots point to scores of these values.
    assert error(values, truth.topk(k, dim=1).values) <= limit
    assert (values.diff(dim=1) <= 0).all()
    assert error(truth.gather(1, classes), values) <= limit
    own = every.gather(1, classes[..., None].expand(-1, -1, every.shape[2]))
    assert error(own.gather(2, slots.long()[..., None])[..., 0], values) <= 2 * limit
    assert all(len(set(row.tolist())) == k for row in classes)
    assert error(lse, truth.logsumexp(1)) <= limit
    torch.testing.assert_close(
        (values - lse[:, None]).exp().double(), truth.softmax(1).topk(k, dim=1).values, atol=1e-5, rtol=1e-3
    )
    return [values, classes, slots, lse]


def test_ties_go_to_the_lowest_class(backend: str, seed: int) -> None:
    """Ties have the order of a stable sort, across blocks and threads; the scores come from the bias."""
    source = generator(seed)
    K = 1700
    x, w, delta, tau = torch.zeros(7, 8), torch.ones(K, 8), torch.empty(0, 8), torch.tensor(1.0)
    bias = torch.randint(0, 4, (K,), generator=source).float()
    for k in (1, 5, 700, K):
        values, classes, _ = gistops.constellation_topk(x, w, delta, tau, k, class_bias=bias, backend=backend)
        order = bias.sort(descending=True, stable=True).indices[:k]
        assert torch.equal(classes, order.expand(7, k))
        assert torch.equal(values, bias[order].expand(7, k))


@pytest.mark.cpu
def test_cost_does_not_grow_with_k(fused: str) -> None:
    """Ascending scores replace a candidate at every class. Sorted lists would take over 100 times the time of a sort."""
    K = 40000
    x, w, tau = torch.ones(1, 2), torch.ones(K, 2), torch.tensor(1.0)
    bias = torch.arange(K).float()
    seconds: list[float] = []
    for k in (K // 2, K):
        runs = []
        for _ in range(3):
            start = time.process_time()
            classes = gistops.constellation_topk(x, w, w[:0], tau, k, class_bias=bias, backend=fused)[1]
            runs.append(time.process_time() - start)
        assert torch.equal(classes[0], torch.arange(K).flip(0)[:k])
        seconds.append(min(runs))
    start = time.process_time()
    for _ in range(3):
        bias[None].sort(dim=1, descending=True)
    assert max(seconds) < 20 * (time.process_time() - start)


def test_nan_is_largest_and_minus_infinity_smallest(backend: str) -> None:
    x, w, delta, tau = torch.zeros(3, 8), torch.ones(900, 8), torch.empty(0, 8), torch.tensor(1.0)
    bias = torch.full((900,), -torch.inf)
    bias[[400, 20, 800, 3]] = torch.tensor([torch.nan, torch.inf, torch.nan, -2.0])
    values, classes, _ = gistops.constellation_topk(x, w, delta, tau, 6, class_bias=bias, backend=backend)
    assert classes[0].tolist() == [400, 800, 20, 3, 0, 1]
    assert values[0, :2].isnan().all()
    assert values[0, 2:].tolist() == [torch.inf, -2.0, -torch.inf, -torch.inf]


#: Scores at the ends and in the middle of 1100 classes, which are several blocks; the others are random numbers.
INFINITE_SCORES: list[dict[int, float]] = [
    {3: inf},
    {700: inf, 1099: inf, 1: -inf},
    {3: -inf, 1099: -inf},
    {3: 1e30, 1099: inf},
    {3: inf, 1099: nan},
    {3: nan, 1099: inf},
    {700: nan},
    dict.fromkeys(range(1100), -inf),
    dict.fromkeys(range(1100), -inf) | {700: 2.0},
    dict.fromkeys(range(1100), -inf) | {700: inf},
    dict.fromkeys(range(1100), -inf) | {700: nan},
    dict.fromkeys(range(1100), inf),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lse_of_infinite_scores(dtype: torch.dtype, backend: str, seed: int) -> None:
    """The log-sum-exp is that of `torch.logsumexp`: +inf for a row with a score of +inf, NaN for a row with NaN."""
    source = generator(seed)
    x, w, delta = torch.zeros(3, 8), torch.ones(1100, 8), torch.empty(0, 8)
    tensors = [t.to(dtype) for t in (x, w, delta, torch.tensor(1.0))]
    for special in INFINITE_SCORES:
        bias = torch.randn(1100, generator=source, dtype=dtype)
        bias[list(special)] = torch.tensor(list(special.values()), dtype=dtype)
        lse = gistops.constellation_topk(*tensors, 2, class_bias=bias, return_lse=True, backend=backend)[3]
        torch.testing.assert_close(lse, bias.logsumexp(0).expand(3), equal_nan=True)


def test_subcenters(backend: str, seed: int) -> None:
    x, w = torch.randn(30, 20), torch.randn(700, 3, 20)
    logits, slots = gistops.subcenter_logits(x, w, 9.0, return_slots=True, backend=backend)
    assert isinstance(logits, Tensor)
    values, classes, best, lse = gistops.subcenter_topk(x, w, 9.0, 20, return_lse=True, backend=backend)
    torch.testing.assert_close(values, logits.topk(20, dim=1).values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits.gather(1, classes), values, atol=1e-5, rtol=1e-5)
    assert torch.equal(slots.gather(1, classes), best)
    torch.testing.assert_close(lse, logits.logsumexp(1), atol=1e-5, rtol=1e-5)


@pytest.mark.cpu
def test_same_bits_as_the_logits(fused: str, seed: int) -> None:
    """On the CPU, scores have the bits of the logits, with precomputed norms too."""
    tensors = Sample(300, 1100, 40, 4).tensors(seed, requires_grad=False)
    logits, slots = gistops.constellation_logits(*tensors, return_slots=True)
    values, classes, best = gistops.constellation_topk(*tensors, 50)
    assert torch.equal(logits.gather(1, classes), values)
    assert torch.equal(slots.gather(1, classes), best)
    x, *rest = tensors
    classifier = Classifier(*rest)
    frozen = local_topk(x, classifier, 50, None, False, None, norms=center_norms(classifier))
    assert all(torch.equal(a, b) for a, b in zip(frozen, (values, classes, best), strict=True))
    for threads in (1, 3, 7):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            again = gistops.constellation_topk(*tensors, 50)
        finally:
            torch.set_num_threads(before)
        torch.testing.assert_close(again[0], values, atol=1e-5, rtol=1e-5)


def test_calls_that_kernels_for_gpus_serve() -> None:
    x, w, delta, tau = Sample(2, 200, 3, 1).tensors(0, requires_grad=False)
    assert can_fuse(Topk(x, w, delta, tau, None, None, None, 128))
    assert not can_fuse(Topk(x, w, delta, tau, None, None, None, 129))
    assert not can_fuse(Topk(x, w[:, None], delta[:0], tau, None, None, None, 1))
    assert not can_fuse(Topk(x, w, delta[:0], tau, None, x[:, :1], x[:, :1, None], 1))
    many = torch.empty((1 << 24) + 1, 3, device="meta")
    assert not can_fuse(Topk(x, many, delta, tau, None, None, None, 1))


def test_empty_batch(backend: str) -> None:
    made = gistops.constellation_topk(*Sample(0, 5, 7, 2).tensors(0), 3, return_lse=True, backend=backend)
    assert [t.shape for t in made] == [(0, 3), (0, 3), (0, 3), (0,)]


def test_no_gradient(backend: str, seed: int) -> None:
    made = gistops.constellation_topk(*Sample(3, 5, 7, 2).tensors(seed), 3, return_lse=True, backend=backend)
    assert not any(t.requires_grad for t in made)


@pytest.mark.parametrize("subcenters", [False, True])
def test_opcheck_and_compile(subcenters: bool, fused: str, seed: int) -> None:
    x, w, delta, tau = Sample(37, 130, 20, 0 if subcenters else 3).tensors(seed, requires_grad=False)
    if subcenters:
        w = torch.randn(130, 2, 20)
    operator = backends.ops(fused).topk.default
    for bias, lse in ((None, True), (torch.randn(130), False)):
        torch.library.opcheck(operator, (x, w, delta, tau, bias, None, None, 7, lse))

    def best(x: Tensor) -> tuple[Tensor, ...]:
        if subcenters:
            return gistops.subcenter_topk(x, w, tau, 7, backend=fused)
        return gistops.constellation_topk(x, w, delta, tau, 7, backend=fused)

    torch._dynamo.reset()
    compiled = torch.compile(best, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (37, 11):
        assert all(torch.equal(a, b) for a, b in zip(compiled(x[:rows]), best(x[:rows]), strict=True))


def test_errors_name_the_argument(backend: str, seed: int) -> None:
    tensors = Sample(6, 12, 20, 2).tensors(seed)
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (0, {}, ValueError, "k: expected an integer from 1 to 12, got 0"),
        (13, {}, ValueError, "k: expected an integer from 1 to 12, got 13"),
        (2.0, {}, TypeError, r"k: expected an integer from 1 to 12, got 2\.0 of type float"),
        (3, {"class_bias": torch.ones(3)}, ValueError, r"class_bias: expected shape \[12\], .* got \[3\]"),
    ]
    for k, more, kind, words in cases:
        with pytest.raises(kind, match=words):
            gistops.constellation_topk(*tensors, k, backend=backend, **more)
    with pytest.raises(ValueError, match=r"centers: expected at least one class, got shape \[0, 20\]"):
        gistops.constellation_topk(tensors[0], tensors[1][:0], *tensors[2:], 1, backend=backend)
