"""Products in half precision on processors with units for them: exact sums, weights rounded once, and when they are used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gistops
from gistops.backends import native
from gistops.operators import registry

from .oracle import error, generator, scores

bf16, half, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
#: B, K, d, m. The blocks have 256 rows, 64, 192 or 512 classes, and 256 columns; rows and classes are padded to 16 and 2.
SIZES = [
    (67, 129, 40, 4),
    (300, 1043, 38, 3),
    (517, 603, 514, 1),
    (33, 1031, 130, 0),
    (1, 70, 64, 5),
    (16, 1, 2, 2),
    (300, 211, 300, 4),  # 288 of the rows fit into the memory of the gradient
    (256, 401, 200, 9),  # 64 of the rows fit
]


def supported() -> bool:
    return bool(native.load().loaded and torch.ops.gistops.cpu_multiplies(bf16))


needs_units = pytest.mark.skipif(
    "not __import__('tests.ops.test_half_products', fromlist=['x']).supported()",
    reason="this processor has no units for bfloat16",
)


def tensors(B: int, K: int, d: int, m: int, seed: int, dtype: torch.dtype = bf16) -> list[Tensor]:
    """Return input, centers, displacements and tau without near ties, for which rounding could choose another slot."""
    source = generator(seed)
    x, w = (
        (torch.randn(2 * B + 40, d, generator=source) * 3).to(dtype),
        torch.randn(K, d, generator=source).to(dtype),
    )
    delta = (torch.randn(m, d, generator=source) * 0.7).to(dtype)
    if m:
        best = torch.stack(
            [
                scores(x[i : i + 1].double(), w.double(), delta.double())[0].topk(2, 1).values
                for i in range(len(x))
            ]
        )
        x = x[(best[..., 0] - best[..., 1]).amin(1) > 1e-6]
    x = x[:B].contiguous()
    assert len(x) == B
    return [x, w, delta, torch.tensor(12.0)]


def sizes_of_terms(wide: list[Tensor], grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return bounds of the terms of the products: Σ_k |H_ik| |w_k| for input, [B, 1], and Σ_i |H_ik| |f_ie| for centers.

    The gradient of input is projected, which spreads an error over the dimensions.
    """
    x, w, delta, tau = (t.detach() for t in wide)
    slots = scores(x, w, delta).argmax(2)
    norms = (w[:, None] + F.pad(delta, (0, 0, 1, 0))).norm(dim=2)  # [K, M]
    weights = tau * grad.abs() / norms.expand(len(x), -1, -1).gather(2, slots[..., None])[..., 0]
    weights = weights / x.norm(dim=1, keepdim=True)
    return weights @ w.norm(dim=1, keepdim=True), weights.T @ x.abs()


def check(made: list[Tensor], wide: list[Tensor], output: Tensor, grad: Tensor) -> None:
    """Compare gradients with those of `output` in float64: half an eps for each weight, and for each gradient."""
    true = torch.autograd.grad(output, wide)
    half_eps = torch.finfo(bf16).eps / 2
    weights = dict(enumerate(sizes_of_terms(wide, grad)))
    for i, (value, expected) in enumerate(zip(made, true, strict=True)):
        bound = 2e-5 * (expected.abs().max() if expected.numel() else 0.0)
        if value.dtype == bf16:
            bound = bound + half_eps * (1 + half_eps) * expected.abs()
        if i in weights:
            bound = bound + half_eps * (1 + half_eps) * weights[i] + 1e-5 * weights[i].max()
        if i == 3:  # the terms G cos of tau's gradient cancel
            bound = bound + 1e-6 * grad.abs().sum()
        excess = (value.double() - expected).abs() - bound
        assert not value.numel() or float(excess.max()) <= 0, (i, error(value, expected))


@needs_units
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_logits(size: tuple[int, int, int, int], seed: int) -> None:
    leaves = [t.requires_grad_() for t in tensors(*size, seed)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    logits = gistops.constellation_logits(*leaves, backend="cpu")
    expected = wide[3] * scores(*wide[:3]).amax(2)
    assert logits.dtype == f32
    assert error(logits, expected) <= 2e-6 * 12
    grad = torch.randn(logits.shape, generator=generator(seed + 1))
    check(list(torch.autograd.grad(logits, leaves, grad)), wide, (expected * grad).sum(), grad.double())


@needs_units
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_loss(size: tuple[int, int, int, int], frozen: bool, seed: int) -> None:
    """If the centers are frozen, the scores are computed again in the backward."""
    leaves = [t.requires_grad_() for t in tensors(*size, seed)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    target = torch.randint(0, size[1], (size[0],), generator=generator(seed + 1))
    logits = wide[3] * scores(*wide[:3]).amax(2)
    expected = F.cross_entropy(logits, target, reduction="sum")
    grad = logits.detach().softmax(1) - F.one_hot(target, size[1])
    leaves[1].requires_grad_(not frozen)
    loss: Any = gistops.constellation_cross_entropy(*leaves, target, reduction="sum", backend="cpu")
    torch.testing.assert_close(loss.double(), expected, atol=1e-4, rtol=1e-5)
    learned = [t for t in leaves if t.requires_grad]
    made = list(torch.autograd.grad(loss, learned))
    if frozen:
        made.insert(1, torch.autograd.grad(expected, wide[1], retain_graph=True)[0])
    check(made, wide, expected, grad)


@needs_units
@pytest.mark.parametrize(
    "size", [(67, 129, 40, 3), (300, 211, 38, 2), (1, 7, 64, 70), (20, 1043, 130, 4)], ids=str
)
def test_subcenters(size: tuple[int, int, int, int], seed: int) -> None:
    """Their scores are exact, and the weights of their backward are not rounded."""
    B, K, d, M = size
    source = generator(seed)
    x = torch.randn(2 * B, d, generator=source).to(bf16)
    w = torch.randn(K, M, d, generator=source).to(bf16)
    cosines = torch.einsum("bd,kmd->bkm", F.normalize(x.double()), F.normalize(w.double(), dim=2))
    best = cosines.topk(2, dim=2).values
    x = x[(best[..., 0] - best[..., 1]).amin(1) > 1e-6]
    leaves = [x[:B].contiguous().requires_grad_(), w.requires_grad_(), torch.tensor(12.0, requires_grad=True)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = (
        torch.einsum("bd,kmd->bkm", F.normalize(wide[0]), F.normalize(wide[1], dim=2)).amax(2) * wide[2]
    )
    target = torch.randint(0, K, (len(leaves[0]),), generator=source)
    assert error(gistops.subcenter_logits(*leaves, backend="cpu"), expected) <= 2e-6 * 12
    loss: Any = gistops.subcenter_cross_entropy(*leaves, target, reduction="sum", backend="cpu")
    true_loss = F.cross_entropy(expected, target, reduction="sum")
    torch.testing.assert_close(loss.double(), true_loss, atol=1e-4, rtol=1e-5)
    made, true = torch.autograd.grad(loss, leaves), torch.autograd.grad(true_loss, wide)
    for value, gradient in zip(made, true, strict=True):
        bound = 2e-5 * float(gradient.abs().max()) + torch.finfo(bf16).eps / 2 * 1.01 * gradient.abs()
        assert ((value.double() - gradient).abs() <= bound).all()


@needs_units
def test_float32_displacements_are_not_rounded(seed: int) -> None:
    x, w, delta, tau = tensors(37, 70, 64, 3, seed)
    delta = delta.float() + 1e-3 * torch.randn(3, 64, generator=generator(seed + 1))
    logits = gistops.constellation_logits(x, w, delta, tau, backend="cpu")
    expected = 12 * scores(x.double(), w.double(), delta.double()).amax(2)
    assert error(logits, expected) <= 2e-6 * 12


@needs_units
@pytest.mark.parametrize("closeness", [0, 2**-7, 2**-3])
def test_pairs_that_cancel(closeness: float, seed: int) -> None:
    """Centers w_k close to -δ_j, whose gradients are summed without rounding."""
    x, w, delta, tau = tensors(70, 131, 40, 3, seed)
    w[5:99] = -(delta[1].float() * (1 + closeness)).to(bf16)
    w[7, 0] = w[7, 0] * 1.5
    target = torch.randint(0, 131, (70,), generator=generator(seed + 1))
    made = []
    for backend, dtype in (("cpu", bf16), ("cpu", f32), ("reference", f64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, w, delta, tau)]
        loss: Any = gistops.constellation_cross_entropy(*leaves, target, reduction="sum", backend=backend)
        made.append([loss, *torch.autograd.grad(loss, leaves)])
    for value, plain, true in zip(*made, strict=True):
        size = float(true.abs().max())
        assert error(value, true) <= 4 * error(plain, true) + 2 * torch.finfo(bf16).eps * size


@needs_units
def test_frozen_heads_and_the_best_classes(seed: int) -> None:
    x, w, delta, tau = tensors(75, 1030, 66, 4, seed)
    expected = 12 * scores(x.double(), w.double(), delta.double()).amax(2)
    norms = torch.ops.gistops.center_norms(w, delta)
    logits, _ = torch.ops.gistops.frozen_logits(x, w, delta, tau, norms)
    assert error(logits, expected) <= 2e-6 * 12
    best = gistops.constellation_topk(x, w, delta, tau, k=5, backend="cpu")
    torch.testing.assert_close(best[0].double(), expected.topk(5).values, atol=2e-5, rtol=0)


@needs_units
def test_products_are_in_float32_if_onednn_is_disabled(seed: int) -> None:
    leaves = [t.requires_grad_() for t in tensors(67, 129, 40, 4, seed)]
    wide = [t.detach().float().requires_grad_() for t in leaves]
    with torch.backends.mkldnn.flags(enabled=False):
        assert not torch.ops.gistops.cpu_multiplies(bf16)
        loss = gistops.constellation_logits(*leaves, backend="cpu").square().sum()
        made = torch.autograd.grad(loss, leaves)
    assert torch.ops.gistops.cpu_multiplies(bf16)
    expected = torch.autograd.grad(gistops.constellation_logits(*wide, backend="cpu").square().sum(), wide)
    for value, true in zip(made, expected, strict=True):
        torch.testing.assert_close(
            value, true.to(value.dtype), atol=1e-5 * float(true.abs().max()), rtol=0.008
        )


@needs_units
def test_results_repeat_bit_for_bit(seed: int) -> None:
    leaves = [t.requires_grad_() for t in tensors(300, 1043, 38, 3, seed)]
    target = torch.arange(300)
    steps = []
    for _ in range(2):
        loss: Any = gistops.constellation_cross_entropy(*leaves, target, backend="cpu")
        steps.append([loss, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))


@needs_units
def test_autocast_rounds_the_operands_once(seed: int) -> None:
    """Results are those of rounded operands, and gradients have the leaves' dtypes. Odd dimensions are not rounded."""
    x, w, delta, tau = tensors(37, 70, 40, 3, seed, f32)
    target = torch.arange(37)
    for d in (40, 39):
        leaves = [t[..., :d].contiguous().requires_grad_() for t in (x, w, delta)] + [tau.requires_grad_()]
        rounded = [t.detach().to(bf16 if t.dim() and d == 40 else f32).requires_grad_() for t in leaves]
        for call in (
            lambda t: gistops.constellation_logits(*t, backend="cpu").square().sum(),
            lambda t: gistops.constellation_cross_entropy(*t, target, backend="cpu"),
        ):
            with torch.autocast("cpu", bf16):
                made = call(leaves)
            expected = call(rounded)
            assert torch.equal(made, expected)
            ours, theirs = torch.autograd.grad(made, leaves), torch.autograd.grad(expected, rounded)
            for leaf, a, b in zip(leaves, ours, theirs, strict=True):
                assert a.dtype == leaf.dtype
                assert torch.equal(a, b.to(a))


@needs_units
def test_autocast_in_a_compiled_graph(seed: int) -> None:
    torch._dynamo.reset()
    leaves = tensors(37, 70, 40, 3, seed, f32)

    def call(t: list[Tensor]) -> Tensor:
        with torch.autocast("cpu", bf16):
            return gistops.constellation_logits(*t, backend="cpu")

    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(leaves), call(leaves))


def test_autocast_does_not_round_for_other_backends() -> None:
    x = torch.randn(3, 4)
    ops = torch.ops.gistops_triton
    with torch.autocast("cpu", bf16):
        assert registry.cast_operands(ops, "cpu", [x])[0] is x
    with torch.autocast("cpu", half):  # no processor in reach sums products of float16 in float32
        made = registry.cast_operands(torch.ops.gistops, "cpu", [x])[0]
    assert made.dtype == (half if torch.ops.gistops.cpu_multiplies(half) else f32)


CHOICE = """
import torch, gistops
from gistops.info import info
x, w, delta = (torch.ones(n, 64, dtype=torch.bfloat16) for n in (3, 70, 2))
w[1:] *= torch.linspace(-1, 1, 64)
logits = gistops.constellation_logits(x, w, delta, 2.0, backend="cpu")
expected = gistops.constellation_logits(x.double(), w.double(), delta.double(), 2.0, backend="reference")
assert (logits - expected).abs().max() < 1e-6
print(info()["cpu"]["float32 products"])
print(info()["cpu"]["bfloat16 products"])
"""


@pytest.mark.parametrize(
    ("variable", "value", "products", "halves"),
    [
        (
            "GISTOPS_CPU_PRODUCTS",
            "blas",
            "BLAS, as GISTOPS_CPU_PRODUCTS asks",
            "as GISTOPS_CPU_PRODUCTS asks",
        ),
        ("GISTOPS_CPU_PRODUCTS", "onednn", "oneDNN, as GISTOPS_CPU_PRODUCTS asks", ""),
        ("GISTOPS_CPU_CAPABILITY", "v3", "", "no AVX-512, or an older set is asked for"),
    ],
)
def test_a_choice_and_its_reason(variable: str, value: str, products: str, halves: str) -> None:
    root = Path(__file__).parents[2]
    environment = dict(os.environ) | {variable: value, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", CHOICE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    float32, bfloat16 = done.stdout.splitlines()
    assert products in float32
    assert halves in bfloat16
