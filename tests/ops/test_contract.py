"""The contract beyond exactness: ties, determinism, degenerate values and sizes, dtypes and layouts."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gistops
from gistops.backends import reference

from .oracle import Sample, operators


def run(tensors: list[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    return gistops.constellation_logits(*tensors, return_slots=True, backend=backend)


@pytest.mark.parametrize("m", [1, 3, 4, 6, 9])
@pytest.mark.parametrize("d", [45, 46])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_go_to_the_lowest_slot(dtype: torch.dtype, d: int, m: int, backend: str, seed: int) -> None:
    tensors = Sample(37, 530, d, m, dtype, dtype, dtype).tensors(seed, requires_grad=False)
    tensors[2][-1] = tensors[2][0]  # the last displacement repeats the first
    assert run(tensors, backend)[1].max() < m or m == 1
    tensors[2].zero_()  # every slot ties
    logits, slots = run(tensors, backend)
    assert not slots.any()
    torch.testing.assert_close(logits, tensors[3] * F.normalize(tensors[0]) @ F.normalize(tensors[1]).T)


def test_the_reference_takes_the_lowest_slot_of_equal_vectors_whatever_their_scores() -> None:
    """A product may sum equal columns differently. Logit and gradient are those of the lowest slot."""
    a, b, c, zero = (*torch.eye(4)[:3].tolist(), [0.0] * 4)
    vectors = torch.tensor([[a, b, a, b], [c, zero, c, c], [a, [torch.nan] * 4, b, [torch.nan] * 4]])
    lowest = reference.lowest_equals(vectors)
    assert lowest.tolist() == [[0, 1, 0, 1], [0, 1, 0, 0], [0, 1, 2, 3]]
    scores = torch.tensor([[[0.4, 0.5, 0.6, 0.2], [0.1, 0.1, 0.2, 0.3], [0.4, torch.nan, 0.3, 0.2]]])
    scores.requires_grad_()
    best, slots = reference.first_best(scores, lowest)
    torch.testing.assert_close(best, torch.tensor([[0.4, 0.1, torch.nan]]), equal_nan=True)
    assert slots.tolist() == [[0, 0, 1]]
    best.sum().backward()
    assert torch.equal(scores.grad, F.one_hot(slots.long(), 4).float())  # type: ignore[arg-type]


def test_same_inputs_give_the_same_bits(fused: str, seed: int) -> None:
    tensors = Sample(300, 1100, 67, 4).tensors(seed)
    grad = torch.randn(300, 1100)

    def bits() -> list[Tensor]:
        logits, slots = run(tensors, fused)
        return [logits, slots, *torch.autograd.grad(logits, tensors, grad)]

    first = bits()
    for _ in range(5):
        torch.empty(1 << 20).normal_()  # changes the memory layout
        assert all(torch.equal(a, b) for a, b in zip(first, bits(), strict=True))


@pytest.mark.cpu
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads(threads: int, fused: str, seed: int) -> None:
    tensors = Sample(301, 517, 40, 4).tensors(seed)
    grad = torch.randn(301, 517)
    logits, slots = run(tensors, "reference")
    expected = torch.autograd.grad(logits, tensors, grad)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours, our_slots = run(tensors, fused)
        value = torch.autograd.grad(ours, tensors, grad)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(ours, logits, atol=2e-5, rtol=1e-5)
    if torch.equal(slots, our_slots):
        torch.testing.assert_close(value, expected, atol=1e-3, rtol=1e-4)


def test_zero_vectors_score_zero_with_finite_gradients(backend: str, seed: int) -> None:
    tensors = Sample(6, 40, 19, 2).tensors(seed)
    with torch.no_grad():
        tensors[0][2] = 0
        tensors[1][5] = 0
        tensors[1][9] = -tensors[2][0]
    logits, slots = run(tensors, backend)
    assert not logits[2].any()
    bare = tensors[3] * F.normalize(tensors[0]) @ F.normalize(tensors[2]).T
    torch.testing.assert_close(logits[:, 5], bare.clamp(min=0).max(dim=1).values)  # slot 0 scores 0
    assert (logits[:, 9] >= 0).sum() >= (slots[:, 9] == 1).sum()  # slot 1 scores 0
    assert not logits[slots[:, 9] == 1, 9].any()
    for gradient in torch.autograd.grad(logits, tensors, torch.randn_like(logits)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_non_finite_values_give_nan_where_they_are_used(
    value: float, argument: int, fused: str, seed: int
) -> None:
    tensors = Sample(6, 40, 19, 2).tensors(seed)
    with torch.no_grad():
        tensors[argument][1, 3] = value
    logits, slots = run(tensors, fused)
    expected, _ = run(tensors, "reference")
    assert torch.equal(logits.isnan(), expected.isnan())
    torch.testing.assert_close(logits, expected, equal_nan=True, atol=2e-5, rtol=1e-5)
    assert (slots <= 2).all()
    torch.autograd.grad(logits, tensors, torch.randn_like(logits))  # neither crashes nor hangs


@pytest.mark.parametrize(("B", "K", "m"), [(0, 5, 2), (3, 0, 2), (0, 0, 0), (1, 1, 0), (2, 1, 4)])
def test_empty_and_tiny(B: int, K: int, m: int, backend: str, seed: int) -> None:
    tensors = Sample(B, K, 7, m).tensors(seed)
    logits, slots = run(tensors, backend)
    assert logits.shape == slots.shape == (B, K)
    if backend == "reference" and K == 0:
        return  # the logits do not depend on the arguments, so there is no gradient
    for tensor, gradient in zip(tensors, torch.autograd.grad(logits.sum(), tensors), strict=True):
        assert gradient.shape == tensor.shape
        assert gradient.isfinite().all()
        if B * K == 0:
            assert not gradient.any()


def test_layouts(fused: str, seed: int) -> None:
    """Transposed, strided and expanded tensors give the results of contiguous tensors."""
    tensors = Sample(21, 90, 33, 3).tensors(seed, requires_grad=False)
    grad = torch.randn(21, 90)
    plain = [t.clone().requires_grad_() for t in tensors]
    logits, slots = run(plain, fused)
    expected = torch.autograd.grad(logits, plain, grad)
    odd = [
        tensors[0].t().contiguous().t().requires_grad_(),
        torch.stack([tensors[1], tensors[1]], dim=2)[:, :, 0].requires_grad_(),
        tensors[2].repeat_interleave(2, dim=0)[::2].requires_grad_(),
        tensors[3].reshape(1, 1).requires_grad_(),
    ]
    assert not any(t.is_contiguous() for t in odd[:2])
    ours, our_slots = run(odd, fused)
    value = torch.autograd.grad(ours, odd, grad.t().contiguous().t())
    assert torch.equal(ours, logits)
    assert torch.equal(our_slots, slots)
    assert value[3].shape == (1, 1)
    for a, b in zip(value, expected, strict=True):
        assert torch.equal(a, b.reshape(a.shape))
    expanded = torch.autograd.grad(run(plain, fused)[0].sum(), plain)  # the gradient of sum() has strides 0
    expected = torch.autograd.grad(run(plain, fused)[0], plain, torch.ones(21, 90))
    assert all(torch.equal(a, b) for a, b in zip(expanded, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_converted_exactly(dtype: torch.dtype, fused: str, seed: int) -> None:
    """Half-precision inputs give the logits of the same values in float32, on CPUs without units for them bit for bit."""
    tensors = Sample(40, 70, 33, 3, dtype, dtype, dtype).tensors(seed, requires_grad=False)
    special = torch.tensor([0.0, -0.0, 6e-8, -6e-8, 5.9e-5, 6.2e-5, 1.0, -2.5, 448.0, 60000.0])
    tensors[0][0, : len(special)] = special.to(dtype)
    tensors[1][0, : len(special)] = special.flip(0).to(dtype)
    logits, slots = run(tensors, fused)
    wide, wide_slots = run([t.float() for t in tensors], fused)
    if fused != "cpu" or torch.ops.gistops.cpu_multiplies(dtype):  # such units sum in another order
        torch.testing.assert_close(logits, wide, atol=2e-5, rtol=1e-5)
        return
    assert torch.equal(logits, wide)
    assert torch.equal(slots, wide_slots)


@pytest.mark.cpu
@pytest.mark.parametrize("threads", [2, 3, 8, 16])
@pytest.mark.parametrize("K", [1, 10, 64, 100])
@pytest.mark.parametrize("B", [257, 600, 1000])
def test_more_threads_than_blocks_of_classes(B: int, K: int, threads: int, seed: int) -> None:
    """The threads divide the rows too, and give the logits and slots of one thread."""
    for dtype in (torch.float32, torch.bfloat16):
        tensors = Sample(B, K, 512, 3, dtype, dtype, dtype).tensors(seed, requires_grad=False)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            expected, slots = run(tensors, "cpu")
            torch.set_num_threads(threads)
            made, made_slots = run(tensors, "cpu")
        finally:
            torch.set_num_threads(before)
        torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-5)
        assert (made_slots != slots).float().mean() < 1e-3  # roundings of near ties


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
def test_only_the_gradients_asked_for(needs: tuple[bool, ...], fused: str, seed: int) -> None:
    """The backward op returns empty gradients for frozen arguments, and does not change the others."""
    tensors = Sample(70, 530, 21, 4).tensors(seed, requires_grad=False)
    forward, backward = operators(fused)
    saved = forward(*tensors)
    grad = torch.randn(70, 530)
    every = backward(grad, *tensors, *saved, True, True, True, True)
    some = backward(grad, *tensors, *saved, *needs)
    for needed, value, expected in zip(needs, some, every, strict=True):
        if needed:  # the compiler may contract tau's sum differently in a loop without the others
            torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-5)
        else:
            assert value.numel() == 0
    frozen = [t.clone().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    if any(needs):
        gistops.constellation_logits(*frozen, backend=fused).backward(grad)
        for tensor, need, expected in zip(frozen, needs, every, strict=True):
            if need:
                torch.testing.assert_close(tensor.grad, expected, atol=1e-4, rtol=1e-5)
            else:
                assert tensor.grad is None
