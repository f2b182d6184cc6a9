"""The range of norms and of τ: overflow is NaN, never 0; tiny norms and tiny τ are exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gistops

from .oracle import Sample, error, generator
from .test_rotation import rotated

f32, f64 = torch.float32, torch.float64
SAMPLE = Sample(9, 21, 12, 2)
TARGET = torch.arange(9)


def leaves_of(seed: int, dtype: torch.dtype = f32) -> list[Tensor]:
    return [t.to(dtype) for t in SAMPLE.tensors(seed, requires_grad=False)]


def results(leaves: list[Tensor], backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, losses and the largest logits."""
    loss: Any = gistops.constellation_cross_entropy(*leaves, TARGET, reduction="none", backend=backend)
    logits = gistops.constellation_logits(*leaves, backend=backend)
    return logits, loss, gistops.constellation_topk(*leaves, 1, backend=backend)[0][:, 0]


def check_overflow(dtype: torch.dtype, backend: str, seed: int) -> None:
    """Norms whose squares overflow give NaN in all logits that they enter, and in the losses and maxima of these."""
    size = 1e20 if dtype == f32 else 1e155
    everywhere = torch.ones(9, 21, dtype=torch.bool)
    row, column = everywhere & (torch.arange(9) == 4)[:, None], everywhere & (torch.arange(21) == 7)
    for argument, place, expected in ((0, 4, row), (1, 7, column), (2, 1, everywhere)):
        leaves = leaves_of(seed, dtype)
        leaves[argument][place] *= size / leaves[argument][place].norm()
        logits, loss, largest = results(leaves, backend)
        assert torch.equal(logits.isnan(), expected)
        assert torch.equal(loss.isnan(), expected.any(1))
        assert torch.equal(largest.isnan(), expected.any(1))
        if argument < 2:
            turned = rotated([*leaves, torch.ones(12, dtype=dtype)], backend)
            assert torch.equal(turned.isnan(), expected)
            vectors = leaves[1][:, None].repeat(1, 2, 1)
            if argument == 1:
                vectors[:, 0] = 1.0  # the second slot alone overflows
            subcenters: Any = gistops.subcenter_logits(leaves[0], vectors, leaves[3], backend=backend)
            assert torch.equal(subcenters.isnan(), expected)


@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
def test_overflow_is_nan(dtype: torch.dtype, backend: str, seed: int) -> None:
    check_overflow(dtype, backend, seed)


def check_extreme_norms(backend: str, seed: int) -> None:
    """Compare with the definition in float64 at norms from 1e-25, which is clamped, to 1e18."""
    for argument in range(3):
        for size in (1e-25, 1e-13, 1e-11, 1e-3, 1e18):
            leaves = leaves_of(seed)
            leaves[argument] *= size / leaves[argument].norm(dim=1, keepdim=True)
            made, wide = ([t.clone().to(d).requires_grad_() for t in leaves] for d in (f32, f64))
            logits = gistops.constellation_logits(*made, backend=backend)
            truth = gistops.constellation_logits(*wide, backend="reference")
            assert error(logits, truth) <= 1e-5 * float(leaves[3])
            # Ties in float32 may have another slot in float64, so that gradients are tested where there are none.
            if argument == 2:
                continue
            made[2] = wide[2] = leaves[2][:0]
            grad = torch.randn(9, 21, generator=generator(seed + 1))
            for gradient, expected in zip(
                torch.autograd.grad(
                    gistops.constellation_logits(*made, backend=backend), (made[0], made[1]), grad
                ),
                torch.autograd.grad(
                    gistops.constellation_logits(*wide, backend="reference"),
                    (wide[0], wide[1]),
                    grad.double(),
                ),
                strict=True,
            ):
                assert error(gradient, expected) <= 1e-4 * float(expected.abs().max())


def test_extreme_norms(backend: str, seed: int) -> None:
    check_extreme_norms(backend, seed)


def check_gradient_of_a_tiny_tau(backend: str, seed: int) -> None:
    """The gradient of τ is the sum of gradient times cosine, even if τ times a cosine is zero in float32."""
    x, w, delta, _ = leaves_of(seed)
    axis = torch.randn(12, generator=generator(seed + 2))
    grad = torch.randn(9, 21, generator=generator(seed + 1))
    tau = torch.tensor(1e-44)
    options: list[dict[str, Any]] = [
        {},
        {"transform": "rotation", "axis": axis},
        {"margin": 0.3, "margin_kind": "cosine"},
        {"margin": 0.3, "margin_kind": "angle"},
        {"margin": 0.3, "margin_kind": "angle", "transform": "rotation", "axis": axis},
    ]
    for more in options:
        made = []
        for dtype, chosen in ((f32, backend), (f64, "reference")):
            leaves = [t.to(dtype) for t in (x, w, delta)]
            scale = tau.to(dtype).requires_grad_()
            wide = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in more.items()}
            loss: Any = gistops.constellation_cross_entropy(
                *leaves, scale, TARGET, reduction="sum", backend=chosen, **wide
            )
            made.append(torch.autograd.grad(loss, scale)[0])
            if "margin" not in more:
                logits = gistops.constellation_logits(*leaves, scale, backend=chosen, **wide)
                assert logits.abs().max() <= 1e-19
                made.append(torch.autograd.grad(logits, scale, grad.to(dtype))[0])
        half = len(made) // 2
        for value, expected in zip(made[:half], made[half:], strict=True):
            assert error(value, expected) <= 1e-5 * float(grad.abs().sum())


def test_gradient_of_a_tiny_tau(backend: str, seed: int) -> None:
    check_gradient_of_a_tiny_tau(backend, seed)


def test_gradient_of_a_tau_of_zero(fused: str, seed: int) -> None:
    """A learned τ may reach 0, which no check may find on a GPU."""
    x, w, delta, _ = leaves_of(seed)
    tau = torch.zeros((), requires_grad=True)
    logits = gistops.backends.ops(fused).logits_forward.default(x, w, delta, tau)[0]
    grad = torch.randn(9, 21, generator=generator(seed + 1))
    cosines = gistops.constellation_logits(x.double(), w.double(), delta.double(), 1.0, backend="reference")
    (gradient,) = torch.autograd.grad(logits, tau, grad)
    assert error(gradient, (grad * cosines).sum()) <= 1e-5 * float(grad.abs().sum())
