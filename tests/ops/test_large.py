"""Sizes beyond 32-bit indices: B·K or K·d above 2³¹. Sampled rows and classes are compared with float64.

The same checks run on small sizes everywhere, so that an error in the checks themselves is found without a large GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gistops

from .oracle import Sample, allowed, error, generator, routed, scores

bf16 = torch.bfloat16
PART = 50_000  # classes per chunk of vectors
COLUMNS = 5_000  # columns of [B, K] per chunk in float64


@dataclass(frozen=True)
class Size:
    B: int
    K: int
    d: int
    m: int
    memory: int  # GiB free

    def tensors(self, seed: int) -> list[Tensor]:
        """Draw input, centers, displacements and tau directly in bfloat16, without a float32 copy."""
        source = generator(seed)
        shapes = ((self.B, self.d), (self.K, self.d), (self.m, self.d))
        x, w, delta = (torch.randn(*shape, generator=source, dtype=bf16) for shape in shapes)
        w *= self.d**-0.5
        delta *= 0.3 * self.d**-0.5
        return [t.requires_grad_() for t in (x, w, delta, torch.tensor(9.0))]

    def rows(self) -> Tensor:
        return torch.tensor([0, 1, self.B // 2, self.B - 2, self.B - 1])

    def classes(self) -> Tensor:
        return torch.tensor([0, 1, self.K // 2, self.K - 2, self.K - 1])


PAIRS, ELEMENTS = Size(21_500, 100_003, 64, 2, 56), Size(32, 1_100_003, 2048, 1, 32)
SIZES = [
    pytest.param(Size(65, 1003, 64, 2, 0), id="small"),
    pytest.param(PAIRS, id="pairs", marks=(pytest.mark.cuda, pytest.mark.large)),
    pytest.param(ELEMENTS, id="elements", marks=(pytest.mark.cuda, pytest.mark.large)),
]


def test_the_sizes_are_beyond_32_bits() -> None:
    assert PAIRS.B * PAIRS.K > 2**31
    assert ELEMENTS.K * ELEMENTS.d > 2**31


@pytest.fixture
def memory(size: Size, device: str) -> None:
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < size.memory:
            pytest.skip(f"takes {size.memory} GiB of GPU memory, {free:.0f} are free")


def wide(tensors: list[Tensor], requires_grad: bool = False) -> list[Tensor]:
    return [t.detach().double().requires_grad_(requires_grad) for t in tensors]


def logits_of(tensors: list[Tensor], rows: Tensor, slots: Tensor | None = None) -> Tensor:
    """Return float64 logits of the rows and all classes: of the best slots, or of given slots."""
    x, w, delta, tau = tensors
    x, delta, tau = x[rows].double(), delta.double(), tau.double()
    chunks = []
    for start in range(0, len(w), PART):
        tensors = [x, w[start : start + PART].double(), delta]
        if slots is None:
            chunks.append(tau * scores(*tensors).amax(2))
        else:
            chunks.append(routed(*tensors, tau, slots[rows, start : start + PART]))
    return torch.cat(chunks, 1)


def gradient_of_rows(tensors: list[Tensor], rows: Tensor, grad: Tensor, slots: Tensor) -> Tensor:
    """Return the gradient of the rows of input for grad [rows, K], one chunk of classes at a time."""
    x, w, delta, tau = wide([tensors[0][rows], tensors[1][:0], *tensors[2:]])
    x.requires_grad_()
    for start in range(0, len(tensors[1]), PART):
        w = tensors[1][start : start + PART].detach().double()
        logits = routed(x, w, delta, tau, slots[rows, start : start + PART])
        logits.backward(grad[:, start : start + PART].double())
    assert x.grad is not None
    return x.grad


def gradient_of_classes(tensors: list[Tensor], classes: Tensor, grad: Tensor, slots: Tensor) -> Tensor:
    """Return the gradient of the centers of these classes for grad [B, classes]."""
    x, w, delta, tau = wide([tensors[0], tensors[1][classes], *tensors[2:]])
    w.requires_grad_()
    routed(x, w, delta, tau, slots[:, classes]).backward(grad.double())
    assert w.grad is not None
    return w.grad


def close(name: str, value: Tensor, truth: Tensor, dtype: torch.dtype, terms: int) -> None:
    limit = allowed(0.0, truth, dtype, terms)
    assert error(value, truth) <= limit, f"{name}: {error(value, truth):.3g} > {limit:.3g}"


@pytest.mark.parametrize("size", SIZES)
def test_logits(size: Size, memory: None, fused: str, seed: int) -> None:
    tensors = size.tensors(seed)
    rows, classes = size.rows(), size.classes()
    logits, slots = gistops.constellation_logits(*tensors, return_slots=True, backend=fused)
    with torch.no_grad():
        truth = logits_of(tensors, rows)
        close("logits", logits[rows], truth, torch.float32, size.d)
        close("slots", logits_of(tensors, rows, slots), truth, torch.float32, size.d)
    grad = torch.randn(size.B, size.K, generator=generator(seed + 1))
    ours = torch.autograd.grad(logits, tensors, grad)
    of_x = gradient_of_rows(tensors, rows, grad[rows], slots)
    close("input", ours[0][rows], of_x, bf16, size.K)
    close(
        "centers",
        ours[1][classes],
        gradient_of_classes(tensors, classes, grad[:, classes], slots),
        bf16,
        size.B,
    )
    assert all(g.isfinite().all() for g in ours)
    with torch.no_grad():  # Σ grad·logits / τ, over all pairs
        parts = [
            (grad[:, i : i + COLUMNS].double() * logits[:, i : i + COLUMNS]).sum()
            for i in range(0, size.K, COLUMNS)
        ]
        truth = torch.stack(parts).sum() / 9
    assert error(ours[3], truth) <= 1e-5 * float(grad.norm()) + 1e-4 * float(truth.abs())


@pytest.mark.parametrize("size", SIZES)
def test_loss(size: Size, memory: None, fused: str, seed: int) -> None:
    tensors = size.tensors(seed)
    rows, classes = size.rows(), size.classes()
    target = torch.randint(0, size.K, (size.B,), generator=generator(seed + 2))
    target[rows] = classes  # the sampled rows have the sampled classes as targets
    loss, lse = gistops.constellation_cross_entropy(
        *tensors, target, reduction="none", return_lse=True, backend=fused
    )
    with torch.no_grad():
        logits = logits_of(tensors, rows)
        close(
            "loss", loss[rows], F.cross_entropy(logits, target[rows], reduction="none"), torch.float32, size.K
        )
        close("lse", lse[rows], logits.logsumexp(1), torch.float32, size.K)
    grad = torch.rand(size.B, generator=generator(seed + 1)) + 0.5
    ours = torch.autograd.grad(loss, tensors, grad)
    with torch.no_grad():
        slots = gistops.constellation_logits(*tensors, return_slots=True, backend=fused)[1]
        of_logits = logits.softmax(1)
        of_logits[torch.arange(len(rows)), target[rows]] -= 1
        x, w, delta, tau = wide([tensors[0], tensors[1][classes], *tensors[2:]])
        column = (tau * scores(x, w, delta).amax(2) - lse.double()[:, None]).exp()
        column -= (target[:, None] == classes).double()
    of_x = gradient_of_rows(tensors, rows, of_logits * grad[rows, None], slots)
    of_w = gradient_of_classes(tensors, classes, column * grad[:, None], slots)
    close("input", ours[0][rows], of_x, bf16, size.K)
    close("centers", ours[1][classes], of_w, bf16, size.B)
    assert all(g.isfinite().all() for g in ours)


@pytest.mark.cuda
@pytest.mark.large
@pytest.mark.parametrize("size", [PAIRS], ids=["pairs"])
def test_topk(size: Size, memory: None, fused: str, seed: int) -> None:
    tensors, rows = size.tensors(seed), size.rows()
    values, classes, _ = gistops.constellation_topk(*tensors, 5, backend=fused)
    with torch.no_grad():
        truth = logits_of(tensors, rows)
    close("values", values[rows], truth.topk(5, dim=1).values, torch.float32, size.d)
    close("classes", truth.gather(1, classes[rows]), values[rows].double(), torch.float32, size.d)


@pytest.mark.cpu
@pytest.mark.large
def test_more_logits_than_32_bits_count(fused: str, seed: int) -> None:
    """The forward on the CPU, in 12 GB."""
    B, K = 21_500, 100_003
    tensors = Sample(B, K, 2, 1).tensors(seed, requires_grad=False)
    logits, slots = gistops.constellation_logits(*tensors, return_slots=True, backend=fused)
    rows = torch.tensor([0, 1, B // 2, B - 2, B - 1])
    assert B * K > 2**31
    expected = gistops.constellation_logits(tensors[0][rows], *tensors[1:], backend="reference")
    torch.testing.assert_close(logits[rows], expected, atol=1e-4, rtol=1e-4)
    assert (slots[rows] == 1).any()
