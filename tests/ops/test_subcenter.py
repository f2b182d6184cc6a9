"""Sub-centers [K, M, d]: logits and loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gistops
from gistops import backends

from .loss_oracle import OPTIONS, Call, Options
from .loss_oracle import gradients as loss_gradients
from .oracle import Sample, allowed, allowed_of_tau, error, generator

half, bf16, f64 = torch.float16, torch.bfloat16, torch.float64


@dataclass(frozen=True)
class SubcenterSample:
    B: int
    K: int
    M: int
    d: int
    input: torch.dtype = torch.float32
    centers: torch.dtype = torch.float32

    def tensors(self, seed: int, requires_grad: bool = True) -> list[Tensor]:
        source = generator(seed)
        values = [
            torch.randn(self.B, self.d, generator=source).to(self.input),
            torch.randn(self.K, self.M, self.d, generator=source).to(self.centers),
            torch.rand((), generator=source) * 20 + 4,
        ]
        return [v.requires_grad_(requires_grad) for v in values]


SAMPLES = [
    SubcenterSample(300, 600, 3, 40),
    SubcenterSample(37, 1043, 2, 37),
    SubcenterSample(260, 530, 3, 130),  # blocks large enough for oneDNN
    SubcenterSample(5, 67, 10, 517),
    SubcenterSample(9, 33, 256, 8),
    SubcenterSample(3, 2, 2, 5),
    SubcenterSample(20, 70, 1, 16),
    SubcenterSample(67, 129, 4, 40, f64, f64),
    SubcenterSample(290, 90, 5, 75, f64, f64),  # more rows and dimensions than a packed strip of the CPU
    SubcenterSample(20, 9, 200, 70),
    SubcenterSample(67, 129, 4, 40, bf16, bf16),
    SubcenterSample(67, 129, 4, 40, half, torch.float32),
]
IDS = [
    "x".join(map(str, (s.B, s.K, s.M, s.d))) + f"-{s.input}-{s.centers}".replace("torch.", "")
    for s in SAMPLES
]


def scores(input: Tensor, centers: Tensor) -> Tensor:
    return torch.einsum("bd,kmd->bkm", F.normalize(input, eps=1e-12), F.normalize(centers, dim=2, eps=1e-12))


def routed(input: Tensor, centers: Tensor, tau: Tensor, slots: Tensor) -> Tensor:
    return tau * scores(input, centers).gather(2, slots.long()[..., None]).squeeze(2)


def both(tensors: list[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    made: Any = gistops.subcenter_logits(*tensors, return_slots=True, backend=backend)
    return made


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
def test_logits_slots_and_gradients(sample: SubcenterSample, backend: str, seed: int) -> None:
    tensors = sample.tensors(seed)
    logits, slots = both(tensors, backend)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    every = wide[2] * scores(*wide[:2])
    truth = every.max(dim=2).values
    same = [t.detach().to(logits.dtype).requires_grad_() for t in tensors]
    plain = (same[2] * scores(*same[:2])).max(dim=2).values
    bound = allowed(error(plain, truth), truth, logits.dtype)
    assert error(logits, truth) <= bound
    assert error(every.gather(2, slots.long()[..., None]).squeeze(2), truth) <= 2 * bound

    grad = torch.randn(sample.B, sample.K, generator=generator(seed + 1))
    ours = torch.autograd.grad(logits, tensors, grad.to(logits.dtype))
    expected = torch.autograd.grad(routed(*wide, slots), wide, grad.double())
    for name, tensor, value, true in zip(("input", "centers", "tau"), tensors, ours, expected, strict=True):
        assert (value.dtype, value.shape) == (tensor.dtype, tensor.shape)
        coarse = max(tensor.dtype, logits.dtype, key=lambda t: torch.finfo(t).eps)
        limit = allowed(0.0, true, coarse, max(sample.B, sample.K))
        if name == "tau":
            limit = allowed_of_tau(grad, logits, tensor, true, torch.float32)
        assert error(value, true) <= limit, name


@pytest.mark.parametrize("dtype", [torch.float32, f64, bf16, half], ids=str)
@pytest.mark.parametrize(
    "sizes", [(23, 31, 4, 19), (37, 129, 3, 40), (64, 300, 8, 64), (1, 70, 5, 512)], ids=str
)
def test_the_lowest_of_equal_subcenters_wins(
    sizes: tuple[int, ...], dtype: torch.dtype, backend: str, seed: int
) -> None:
    """Matrix products may sum the columns of equal vectors in different orders."""
    x, w, tau = SubcenterSample(*sizes, dtype, dtype).tensors(seed, requires_grad=False)
    w[::2, -1] = w[::2, 1]
    w[1::3] = w[1::3, :1]
    w[5] *= 0
    slots = both([x, w, tau], backend)[1]
    assert not (slots[:, ::2] == sizes[2] - 1).any()
    assert not slots[:, 1::3].any()
    assert not slots[:, 5].any()
    target = torch.zeros(len(x), dtype=torch.int64)
    loss = gistops.subcenter_cross_entropy(x, w.requires_grad_(), tau, target, backend=backend)
    (gradient,) = torch.autograd.grad(loss, w)
    assert not gradient[::2, -1].any()
    assert not gradient[1::3, 1:].any()


@pytest.mark.parametrize("options", OPTIONS, ids=[o.id for o in OPTIONS])
@pytest.mark.parametrize(
    "sample",
    [
        SubcenterSample(37, 530, 3, 40),
        SubcenterSample(90, 200, 2, 330),
        SubcenterSample(7, 90, 4, 9, f64, f64),
    ],
)
def test_loss(sample: SubcenterSample, options: Options, fused: str, seed: int) -> None:
    x, w, tau = sample.tensors(seed, requires_grad=False)
    call = Call.of(Sample(sample.B, sample.K, sample.d, 0), options, seed)
    call.tensors[:] = [x, w, call.tensors[2].to(x.dtype), tau]
    leaves, wide = call.leaves(), call.leaves(f64)
    made = call.ours(leaves, fused)
    slots = both([x, w, tau], fused)[1]
    truth = call.written_out(routed(wide[0], wide[1], wide[3], slots), wide)
    values = [*made, *loss_gradients(*made, leaves, seed)]
    expected = [*truth, *loss_gradients(*truth, wide, seed)]
    for value, true in zip(values, expected, strict=True):
        size = 1 + (float(true.detach().abs().max()) if true.numel() else 0)
        assert error(value, true) <= (1e-9 if value.dtype == f64 else 1e-4) * size


def test_a_constellation_equals_its_vectors_as_subcenters(backend: str, seed: int) -> None:
    x, w, delta, tau = Sample(67, 529, 40, 3, f64, f64, f64).tensors(seed)
    grad = torch.randn(67, 529, dtype=f64)
    vectors = w[:, None] + F.pad(delta, (0, 0, 1, 0))
    subcenters, slots = both([x, vectors, tau], backend)
    shared, same = gistops.constellation_logits(x, w, delta, tau, return_slots=True, backend=backend)
    torch.testing.assert_close(subcenters, shared)
    assert torch.equal(slots, same)
    leaves = [x, w, delta, tau]
    torch.testing.assert_close(
        torch.autograd.grad(subcenters, leaves, grad), torch.autograd.grad(shared, leaves, grad)
    )


def test_ties_zeros_and_what_is_not_finite(backend: str, seed: int) -> None:
    x, w, tau = SubcenterSample(20, 600, 3, 24).tensors(seed, requires_grad=False)
    x, w = (2 * x).round(), (2 * w).round()  # sums of integers are exact in any order
    w[:, 2] = w[:, 0]
    w[5] = 0
    w[7, 1] = float("nan")
    logits, slots = both([x, w, tau], backend)
    assert slots.max() == 1
    assert not logits[:, 5].any()
    assert not slots[:, 5].any()
    assert logits[:, 7].isnan().all()
    assert logits[:, 8:].isfinite().all()


def test_same_bits_and_layouts(fused: str, seed: int) -> None:
    x, w, tau = SubcenterSample(130, 700, 3, 66).tensors(seed)
    grad = torch.randn(130, 700)
    first = both([x, w, tau], fused)
    expected = torch.autograd.grad(first[0], [x, w, tau], grad)
    odd = [
        x.detach().t().contiguous().t().requires_grad_(),
        w.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
        tau.detach().reshape(1).requires_grad_(),
    ]
    made = both(odd, fused)
    assert torch.equal(made[0], first[0])
    assert torch.equal(made[1], first[1])
    for a, b in zip(torch.autograd.grad(made[0], odd, grad), expected, strict=True):
        assert torch.equal(a, b.reshape(a.shape))


def test_opcheck_gradcheck_and_compile(fused: str, seed: int) -> None:
    tensors = SubcenterSample(37, 130, 3, 20).tensors(seed)
    x, w, tau = tensors
    ops = backends.ops(fused)
    forward, backward = ops.subcenter_forward.default, ops.subcenter_backward.default
    torch.library.opcheck(forward, (x, w, tau))
    with torch.no_grad():
        saved = forward(x, w, tau)
    frozen = [x.detach(), w.detach(), tau.detach()]
    for needs in ((True,) * 3, (True, False, True), (False, True, False)):
        torch.library.opcheck(backward, (torch.randn_like(saved[0]), *frozen, *saved, *needs))

    small = [t.detach().double().requires_grad_() for t in SubcenterSample(3, 5, 2, 4).tensors(seed)]
    assert torch.autograd.gradcheck(lambda *t: gistops.subcenter_logits(*t, backend=fused), small)

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *t: gistops.subcenter_logits(*t, backend=fused),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for rows in (37, 12):
        some = x.detach()[:rows].requires_grad_()
        grad = torch.randn(rows, 130)
        pair = [f(some, w, tau) for f in (compiled, lambda *t: gistops.subcenter_logits(*t, backend=fused))]
        assert torch.equal(*pair)
        for a, b in zip(*(torch.autograd.grad(p, [some, w, tau], grad) for p in pair), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_errors_name_the_argument(backend: str) -> None:
    x, w = torch.randn(3, 8), torch.randn(5, 2, 8)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"centers": w[:, 0]}, r"centers: expected shape \[K, M, 8\].* got \[5, 8\]"),
        ({"centers": w[:, :, :7]}, r"centers: expected shape \[K, M, 8\].* got \[5, 2, 7\]"),
        ({"centers": w[:, :0]}, r"centers: .*got \[5, 0, 8\]"),
        ({"centers": torch.randn(1, 257, 8)}, r"centers: .*256.* got \[1, 257, 8\]"),
        ({"tau": torch.ones(2)}, r"tau: expected a tensor of one element, got shape \[2\]"),
    ]
    for change, words in cases:
        with pytest.raises(ValueError, match=words):
            gistops.subcenter_logits(**{"input": x, "centers": w, "tau": 4.0, "backend": backend} | change)
