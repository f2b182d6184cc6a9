"""The cross-entropy against float64, with every option, and its contract."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import gistops

from .loss_oracle import IGNORED, OPTIONS, Call, Options, gradients
from .oracle import Sample, allowed, error, generator, routed, scores

half, bf16, f64 = torch.float16, torch.bfloat16, torch.float64
# If d >= 320, the CPU stashes the scores of all rows, or of the first rows (csrc/cpu/cross_entropy.h).
SAMPLES = [
    Sample(37, 1043, 80, 4),
    Sample(300, 700, 64, 3),
    Sample(70, 530, 330, 4),
    Sample(400, 310, 330, 2),
    Sample(5, 3, 7, 1),
    Sample(4, 1, 3, 2),
    Sample(33, 70, 16, 0),
    Sample(67, 129, 40, 4, f64, f64, f64),
    Sample(67, 129, 40, 4, bf16, bf16, bf16),
    Sample(30, 600, 330, 4, half, torch.float32, torch.float32),
]
NAMES = ("input", "centers", "displacements", "tau", "class_bias", "margin")
#: Roundings of a term f̂ - cos(f, v) v̂ of a gradient, which are as large as f̂ where the term cancels.
ROUNDINGS = 4


def compare(call: Call, backend: str, seed: int) -> None:
    """Compare loss, lse and all gradients with float64, for the slots that the backend chose."""
    ours = call.leaves()
    loss, lse = call.ours(ours, backend)
    made = [loss, lse, *gradients(loss, lse, ours, seed)]
    slots = gistops.constellation_logits(*ours[:4], return_slots=True, backend=backend)[1]
    expected = []
    for dtype in (f64, torch.float32):
        leaves = call.leaves(dtype)
        truth = call.written_out(routed(*leaves[:4], slots), leaves)
        expected.append([*truth, *gradients(*truth, leaves, seed)])
    ties, lengths, steep = allowances(call, slots, seed)
    for i, (value, truth, plain) in enumerate(zip(made, *expected, strict=True)):
        name = ("loss", "lse", *NAMES)[i]
        # The terms of sums over rows (for τ also over classes) cancel, and the softmax multiplies a rounding by τ.
        terms = (
            call.target.numel() * (call.bias.numel() if name == "tau" else 1) + float(ours[3].detach()) ** 2
        )
        unit = truth.new_ones(1) if i in (0, 1) or name in NAMES[3:] else truth.flatten()
        size = torch.cat([truth.flatten(), unit])
        limit = steep * allowed(error(plain, truth), size, value.dtype, round(terms)) + ties.get(name, 0.0)
        limit += ROUNDINGS * torch.finfo(loss.dtype).eps * lengths.get(name, 0.0)
        assert error(value, truth) <= limit, f"{name}: {error(value, truth):.3g} > {limit:.3g}"


def allowances(
    call: Call, slots: torch.Tensor, seed: int
) -> tuple[dict[str, float], dict[str, float], float]:
    """Return per gradient the error allowed for near-ties and the root of the sum of its squared terms, and the factor by which
    an angular margin enlarges errors.

    The loss uses other blocks of classes than the logits. If the best two slots differ by roundings alone, loss and logits
    may choose different slots. Each term of a gradient's sum is rounded, also if the terms cancel.
    """
    leaves = call.leaves(f64)
    x, w, delta, tau = leaves[:4]
    logits = routed(x, w, delta, tau, slots)
    upstream = torch.zeros_like(logits)
    if logits.numel():
        both = call.written_out(logits, leaves)
        source = generator(seed + 2)
        grads = [torch.randn(t.shape, generator=source).double() for t in both]
        (upstream,) = torch.autograd.grad(both, logits, [grads[0], 0.1 * grads[1]])
    every = scores(x, w, delta).detach()
    gap = (
        every.topk(2, dim=2).values.diff(dim=2).abs()[..., 0]
        if every.shape[2] > 1
        else torch.ones_like(logits)
    )
    longest = 1 / min(float(x.detach().norm(dim=1).min()), float(w.detach().norm(dim=1).min()))
    terms = float(tau.detach()) * longest * upstream.abs()
    tied = torch.where(gap < 1e-6, terms, 0)
    ties = {
        "input": float(tied.sum(1).max()) if tied.numel() else 0.0,
        "centers": float(tied.sum(0).max()) if tied.numel() else 0.0,
        "displacements": float(tied.sum()),
    }
    squares = terms.square()
    lengths = {
        "input": float(squares.sum(1).max()) ** 0.5 if tied.numel() else 0.0,
        "centers": float(squares.sum(0).max()) ** 0.5 if tied.numel() else 0.0,
        "displacements": float(squares.sum()) ** 0.5,
    }
    if call.options.margin != "angle":
        return ties, lengths, 1.0
    target = call.target.long().clamp(min=0)
    cosine = (logits.detach() / tau.detach()).gather(1, target[:, None])
    return ties, lengths, float((1 - cosine.square()).clamp(min=1e-2).pow(-1.5).max())


@pytest.mark.parametrize("options", OPTIONS, ids=[o.id for o in OPTIONS])
@pytest.mark.parametrize("sample", SAMPLES, ids=[s.id for s in SAMPLES])
def test_loss_and_gradients(sample: Sample, options: Options, fused: str, seed: int) -> None:
    compare(Call.of(sample, options, seed), fused, seed)


@pytest.mark.parametrize("options", OPTIONS[:6], ids=[o.id for o in OPTIONS[:6]])
def test_the_reference_is_the_definition(options: Options, seed: int) -> None:
    call = Call.of(Sample(37, 143, 30, 4, f64, f64, f64), options, seed)
    leaves = call.leaves(f64)
    made = call.ours(leaves, "reference")
    slots = gistops.constellation_logits(*leaves[:4], return_slots=True, backend="reference")[1]
    truth = call.written_out(routed(*leaves[:4], slots), leaves)
    for a, b in zip(
        (*made, *gradients(*made, leaves, seed)), (*truth, *gradients(*truth, leaves, seed)), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("index", [-100, -1, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_ignored_rows_count_for_nothing(index: int, smoothing: float, backend: str, seed: int) -> None:
    """If ignore_index is a class, the rows of the class are ignored, as in F.cross_entropy."""
    x, w, delta, tau = Sample(60, 12, 20, 2).tensors(seed)
    target = torch.randint(0, 12, (60,))
    target[::7] = index
    logits = gistops.constellation_logits(x, w, delta, tau, backend=backend)
    for reduction in ("mean", "sum", "none"):
        loss = gistops.constellation_cross_entropy(
            x, w, delta, tau, target, ignore_index=index, label_smoothing=smoothing, reduction=reduction,
            backend=backend,
        )  # fmt: skip
        expected = F.cross_entropy(
            logits, target, ignore_index=index, label_smoothing=smoothing, reduction=reduction
        )
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert not grad[target == index].any()


def test_all_rows_ignored(backend: str, seed: int) -> None:
    tensors = Sample(6, 12, 20, 2).tensors(seed)
    target = torch.full((6,), IGNORED)
    mean = gistops.constellation_cross_entropy(*tensors, target, backend=backend)
    assert mean.isnan()
    for reduction in ("sum", "none"):
        loss = gistops.constellation_cross_entropy(*tensors, target, reduction=reduction, backend=backend)
        assert not loss.any()
        for gradient in torch.autograd.grad(loss.sum(), tensors):
            assert not gradient.any()


@pytest.mark.parametrize(("B", "K", "m"), [(0, 5, 2), (1, 1, 0), (2, 1, 4), (1, 3, 0)])
def test_empty_and_tiny(B: int, K: int, m: int, backend: str, seed: int) -> None:
    tensors = Sample(B, K, 7, m).tensors(seed)
    target = torch.zeros(B, dtype=torch.int64)
    loss, lse = gistops.constellation_cross_entropy(
        *tensors, target, reduction="sum", return_lse=True, backend=backend
    )
    assert loss.shape == ()
    assert lse.shape == (B,)
    logits = gistops.constellation_logits(*(t.detach().double() for t in tensors), backend="reference")
    expected = F.cross_entropy(logits, target, reduction="sum")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    for tensor, gradient in zip(tensors, torch.autograd.grad(loss, tensors, allow_unused=True), strict=True):
        assert gradient is None or gradient.shape == tensor.shape
        assert gradient is None or gradient.isfinite().all()


def test_no_classes(backend: str) -> None:
    tensors = Sample(2, 0, 7, 1).tensors(0)
    with pytest.raises(ValueError, match=r"centers: expected at least one class, got shape \[0, 7\]"):
        gistops.constellation_cross_entropy(*tensors, torch.zeros(2, dtype=torch.int64), backend=backend)


@pytest.mark.cpu  # a device-side assertion makes the GPU unusable for the process
@pytest.mark.parametrize(("value", "index"), [(12, -100), (-1, -100), (-100, -1)])
def test_a_target_out_of_range(value: int, index: int, backend: str, seed: int) -> None:
    tensors = Sample(6, 12, 20, 2).tensors(seed)
    for requires_grad in (True, False):
        target = torch.zeros(6, dtype=torch.int64)
        target[4] = value
        tensors = [t.detach().requires_grad_(requires_grad) for t in tensors]
        with pytest.raises(IndexError, match=rf"expected 0 to 11 or .*{index}, got {value} at position 4"):
            gistops.constellation_cross_entropy(*tensors, target, ignore_index=index, backend=backend)


def test_small_losses_keep_their_digits(fused: str, seed: int) -> None:
    """A loss of 1e-20 is the sum of the other classes' probabilities; lse - logit would be 0."""
    x, w, delta, _ = Sample(9, 9, 64, 2).tensors(seed)
    x = w.detach().clone().requires_grad_()
    tau, target = torch.tensor(64.0), torch.arange(9)
    loss = gistops.constellation_cross_entropy(x, w, delta, tau, target, reduction="none", backend=fused)
    wide = [t.detach().double().requires_grad_() for t in (x, w, delta)]
    logits = gistops.constellation_logits(*wide, tau, backend="reference")
    others = logits.masked_fill(torch.eye(9, dtype=torch.bool), -torch.inf).logsumexp(1)
    truth = F.softplus(others - logits.diagonal())
    assert truth.max() < 1e-12
    torch.testing.assert_close(loss.double(), truth, rtol=1e-3, atol=0)
    # The gradient of the target's score, -(1 - p), is not 0 either.
    (grad,) = torch.autograd.grad(loss.sum(), w)
    (expected,) = torch.autograd.grad(truth.sum(), wide[1])
    assert error(grad, expected) < 1e-2 * expected.abs().max()


def test_classes_excluded_by_their_bias(backend: str, seed: int) -> None:
    """A bias of minus infinity excludes a class: zero probability, zero gradient, and no NaN."""
    tensors = Sample(11, 700, 20, 2).tensors(seed)
    bias = torch.zeros(700)
    bias[100:] = -torch.inf
    target = torch.randint(0, 100, (11,))
    leaf = bias.clone().requires_grad_()
    loss, lse = gistops.constellation_cross_entropy(
        *tensors, target, class_bias=leaf, return_lse=True, backend=backend
    )
    few = gistops.constellation_logits(tensors[0], tensors[1][:100], *tensors[2:], backend=backend)
    torch.testing.assert_close(lse, few.logsumexp(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, F.cross_entropy(few, target), atol=1e-5, rtol=1e-5)
    made = torch.autograd.grad(loss, [*tensors, leaf])
    assert all(g.isfinite().all() for g in made)
    assert not made[1][100:].any()
    assert not made[4][100:].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_non_finite_values_are_not_hidden(value: float, requires_grad: bool, backend: str, seed: int) -> None:
    tensors = Sample(6, 40, 330, 2).tensors(seed, requires_grad)
    with torch.no_grad():
        tensors[0][2, 5] = value
    target = torch.zeros(6, dtype=torch.int64)
    loss = gistops.constellation_cross_entropy(*tensors, target, reduction="none", backend=backend)
    assert loss[2].isnan()
    assert loss[[0, 1, 3, 4, 5]].isfinite().all()
    with torch.no_grad():
        tensors[0][2, 5] = 1
        tensors[1][7, 5] = value
    assert (
        gistops.constellation_cross_entropy(*tensors, target, reduction="none", backend=backend).isnan().all()
    )


@pytest.mark.parametrize("B", [70, 400])
def test_same_inputs_give_the_same_bits(B: int, fused: str, seed: int) -> None:
    call = Call.of(Sample(B, 1100, 330, 4), Options("none", smoothing=0.1, bias=True), seed)

    def bits() -> list[torch.Tensor]:
        leaves = call.leaves()
        made = call.ours(leaves, fused)
        return [*made, *gradients(*made, leaves, seed)]

    first = bits()
    for _ in range(4):
        torch.empty(1 << 20).normal_()  # changes the memory layout
        assert all(torch.equal(a, b) for a, b in zip(first, bits(), strict=True))


@pytest.mark.cpu
@pytest.mark.parametrize("threads", [1, 3, 7])
def test_any_number_of_threads(threads: int, fused: str, seed: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(Call.of(Sample(301, 917, 330, 4), Options("none", bias=True), seed), fused, seed)
    finally:
        torch.set_num_threads(before)


def test_layouts(fused: str, seed: int) -> None:
    call = Call.of(Sample(21, 390, 33, 3), Options("none", bias=True, weight=True), seed)
    leaves = call.leaves()
    expected = call.ours(leaves, fused)
    odd = [
        leaves[0].detach().t().contiguous().t().requires_grad_(),
        torch.stack([leaves[1].detach()] * 2, dim=2)[:, :, 0].requires_grad_(),
        leaves[2].detach().repeat_interleave(2, dim=0)[::2].requires_grad_(),
        leaves[3].detach().reshape(1, 1).requires_grad_(),
        leaves[4].detach().repeat_interleave(2)[::2].requires_grad_(),
        leaves[5],
    ]
    strided = dataclasses.replace(
        call, weight=call.weight.repeat_interleave(3)[::3], target=call.target.repeat_interleave(2)[::2]
    )
    made = strided.ours(odd, fused)
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    for a, b in zip(gradients(*made, odd, seed), gradients(*expected, leaves, seed), strict=True):
        assert torch.equal(a, b.reshape(a.shape))


def test_margins_of_one_number(backend: str, seed: int) -> None:
    tensors = Sample(20, 50, 30, 2).tensors(seed)
    target = torch.randint(0, 50, (20,))
    for kind in ("logit", "cosine", "angle"):
        per_class, number, tensor = (
            gistops.constellation_cross_entropy(*tensors, target, margin=m, margin_kind=kind, backend=backend)
            for m in (torch.full((50,), 0.25), 0.25, torch.tensor(0.25))
        )
        assert torch.equal(per_class, number)
        assert torch.equal(per_class, tensor)
    plain = gistops.constellation_cross_entropy(*tensors, target, backend=backend)
    assert per_class > plain


def test_an_angle_beyond_pi_still_costs_more(backend: str, seed: int) -> None:
    """If θ + margin > π, cos would rise again; the authors' code continues linearly."""
    w = F.normalize(torch.randn(3, 8), dim=1).requires_grad_()
    x = -w[:1].detach()
    none = torch.empty(0, 8)
    losses = [
        gistops.constellation_cross_entropy(
            x, w, none, 4.0, torch.tensor([0]), margin=m, margin_kind="angle", backend=backend
        )
        for m in (0.0, 0.1, 0.5, 1.0)
    ]
    assert all(a < b for a, b in itertools.pairwise(losses))
    assert all(torch.autograd.grad(loss, w)[0].isfinite().all() for loss in losses)
    expected = F.cross_entropy(
        4 * (x @ w.T).index_fill(1, torch.tensor([0]), -1 - math.sin(1.0)), torch.tensor([0])
    )
    torch.testing.assert_close(losses[-1], expected, atol=1e-5, rtol=1e-5)
