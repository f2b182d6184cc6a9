"""Rotations without a plane, or with one that is hard to find: `constellation_logits` defines them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gistops

from .oracle import Sample, error, generator
from .test_rotation import rotated, written_out

f32, f64 = torch.float32, torch.float64
SAMPLE = Sample(19, 70, 24, 3)


def leaves_of(seed: int, dtype: torch.dtype = f32) -> list[Tensor]:
    """Return x, w, δ, τ and the axis."""
    tensors = SAMPLE.tensors(seed, requires_grad=False)
    axis = torch.randn(SAMPLE.d, generator=generator(seed + 7))
    return [t.to(dtype) for t in (*tensors, axis)]


def gradients(leaves: list[Tensor], backend: str, grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    logits = rotated(leaves, backend)
    return torch.autograd.grad(logits, leaves, grad.to(logits.dtype))


def check_without_a_plane(backend: str, seed: int) -> None:
    """Compare a zero displacement and a zero axis with the bare centers: equal logits, slot 0, finite gradients."""
    x, w, delta, tau, axis = leaves_of(seed)
    delta[1] = 0
    delta[2] = 1e-13  # the norm is below 1e-12
    grad = torch.randn(SAMPLE.B, SAMPLE.K, generator=generator(seed + 1))
    _, slots = rotated([x, w, delta, tau, axis], backend, return_slots=True)
    assert set(slots.unique().tolist()) == {0, 1}
    computed = gradients([x, w, delta, tau, axis], backend, grad)
    assert all(g.isfinite().all() for g in computed)
    assert not computed[2][1:].any()
    cosine = gistops.constellation_logits(x, w, delta[:0], tau, backend="reference")
    for displacements, direction in ((delta[1:], axis), (delta, 0 * axis)):
        leaves = [x, w, displacements, tau, direction]
        logits, slots = rotated(leaves, backend, return_slots=True)
        assert not slots.any()
        assert error(logits, cosine) <= 1e-5 * float(tau)
        computed = gradients(leaves, backend, grad)
        assert all(g.isfinite().all() for g in computed)
        assert not computed[2].any()
        assert not computed[4].any()


def test_a_zero_displacement_or_axis_turns_nothing(backend: str, seed: int) -> None:
    check_without_a_plane(backend, seed)


def half_turn(axis: Tensor) -> Tensor:
    """Return the rotation by π that `constellation_logits` states for a displacement opposite to the axis."""
    axis = axis.double()
    place = int(axis.abs().argmin())
    plane = torch.linalg.qr(torch.stack([axis, F.one_hot(torch.tensor(place), len(axis)).double()], 1)).Q
    return torch.eye(len(axis), dtype=f64) - 2 * plane @ plane.T


def check_opposite(backend: str, seed: int, dtype: torch.dtype) -> None:
    x, w, _, tau, axis = leaves_of(seed, dtype)
    wide = w.double() @ half_turn(axis).T
    scores = [F.normalize(x.double(), dim=1) @ F.normalize(v, dim=1).T for v in (w.double(), wide)]
    expected, winner = (float(tau) * torch.stack(scores, 2)).max(dim=2)
    grad = torch.randn(SAMPLE.B, SAMPLE.K, generator=generator(seed + 1))
    for factor in (-1, -4):
        leaves = [x, w, factor * axis[None], tau, axis]
        logits, slots = rotated(leaves, backend, return_slots=True)
        assert error(logits, expected) <= (1e-5 if dtype == f32 else 1e-12) * float(tau)
        apart = (scores[0] - scores[1]).abs() > 1e-5
        assert torch.equal(slots[apart].long(), winner[apart])
        assert 0 < winner.sum() < winner.numel()
        assert all(g.isfinite().all() for g in gradients(leaves, backend, grad))


@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
def test_an_opposite_displacement_makes_a_half_turn(dtype: torch.dtype, backend: str, seed: int) -> None:
    check_opposite(backend, seed, dtype)


def check_nearly_parallel(sign: int, backend: str, seed: int) -> None:
    """Compare logits with exact rotations from and to the same numbers, at angles down to the rounding of float32."""
    for size in (1e-2, 1e-4, 1e-6, 3e-7):  # the last is a few roundings of the axis
        x, w, delta, tau, axis = leaves_of(seed)
        delta = sign * axis + size * F.normalize(delta, dim=1) * SAMPLE.d**0.5
        leaves = [x, w, delta, tau, axis]
        truth = written_out(*(t.double() for t in leaves)).max(dim=2).values
        assert error(rotated(leaves, backend), truth) <= 1e-5 * float(tau), size
        grad = torch.randn(SAMPLE.B, SAMPLE.K, generator=generator(seed + 1))
        assert all(g.isfinite().all() for g in gradients(leaves, backend, grad))


@pytest.mark.parametrize("sign", [-1, 1])
def test_displacements_nearly_parallel_to_the_axis(sign: int, backend: str, seed: int) -> None:
    check_nearly_parallel(sign, backend, seed)


def test_one_dimension(backend: str, seed: int) -> None:
    """Every rotation of a line is the identity or the reflection."""
    x, w = torch.randn(5, 1), torch.randn(6, 1)
    delta, axis = torch.tensor([[-2.0], [3.0]]), torch.ones(1)
    logits: Any = rotated([x, w, delta, torch.tensor(4.0), axis], backend)
    torch.testing.assert_close(logits, torch.full((5, 6), 4.0))


@pytest.mark.parametrize("sign", [-1, 1])
def test_gradients_nearly_parallel_to_the_axis(sign: int, fused: str, seed: int) -> None:
    """In float64, where slots of fused backend and reference differ only in ties."""
    x, w, delta, tau, axis = leaves_of(seed, f64)
    leaves = [x, w, sign * axis + 1e-3 * delta, tau, axis]
    grad = torch.randn(SAMPLE.B, SAMPLE.K, generator=generator(seed + 1), dtype=f64)
    for made, expected in zip(
        gradients(leaves, fused, grad), gradients(leaves, "reference", grad), strict=True
    ):
        assert error(made, expected) <= 1e-8 * float(expected.abs().max())
