"""Rotated centers: logits and gradients against rotation matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gistops
from gistops import backends
from gistops.functional.transforms.rotation import plane

from .oracle import Sample, error, generator

half, bf16, f64 = torch.float16, torch.bfloat16, torch.float64
SAMPLES = [
    Sample(37, 1043, 80, 4),
    Sample(300, 600, 130, 3),
    Sample(70, 530, 330, 2),
    Sample(33, 70, 530, 3),  # more dimensions than the CPU corrects at a time
    Sample(5, 130, 7, 9),
    Sample(4, 33, 5, 0),
    Sample(1, 1, 2, 1),
    Sample(67, 129, 40, 4, f64, f64, f64),
    Sample(67, 129, 40, 4, bf16, bf16, bf16),
    Sample(67, 129, 40, 4, half, torch.float32, torch.float32),
]


def axis_of(sample: Sample, seed: int) -> Tensor:
    return torch.randn(sample.d, generator=generator(seed + 7), requires_grad=True)


def matrices(displacements: Tensor, axis: Tensor) -> list[Tensor]:
    """Return exp(θ(v uᵀ - u vᵀ)) for each displacement, a formula that gistops does not use."""
    u = F.normalize(axis, dim=0)
    made = []
    for delta in F.normalize(displacements, dim=1):
        v = F.normalize(delta - (delta @ u) * u, dim=0)
        angle = torch.atan2(delta @ v, delta @ u)
        made.append(torch.matrix_exp(angle * (torch.outer(v, u) - torch.outer(u, v))))
    return made


def written_out(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor, axis: Tensor) -> Tensor:
    """Return all scores [B, K, M]."""
    vectors = torch.stack([w, *(w @ turn.T for turn in matrices(delta, axis))], dim=1)
    cosines = torch.einsum("bd,kmd->bkm", F.normalize(x), F.normalize(vectors, dim=2))
    return tau * cosines


def rotated(leaves: list[Tensor], backend: str | None, **more: Any) -> Any:
    x, w, delta, tau, axis = leaves
    return gistops.constellation_logits(
        x, w, delta, tau, transform="rotation", axis=axis, backend=backend, **more
    )


def test_they_are_rotations_that_take_the_axis_to_the_displacement(seed: int) -> None:
    sample = Sample(1, 1, 23, 5, f64, f64, f64)
    delta = sample.tensors(seed, requires_grad=False)[2]
    axis = axis_of(sample, seed).detach().double()
    delta[1] += axis  # angles on either side of π / 2
    delta[2] -= axis
    u, p, a, b, n = plane(delta, axis)
    for j, expected in enumerate(matrices(delta, axis)):
        turn = (
            torch.eye(23, dtype=f64)
            + a[j] * torch.outer(u, u)
            + b[j] * torch.outer(p[j], p[j])
            + n[j] * (torch.outer(p[j], u) - torch.outer(u, p[j]))
        )
        torch.testing.assert_close(turn, expected)
        torch.testing.assert_close(turn @ turn.T, torch.eye(23, dtype=f64))
        assert float(torch.linalg.det(turn)) == pytest.approx(1)
        torch.testing.assert_close(turn @ u, F.normalize(delta[j], dim=0))


@pytest.mark.parametrize("sample", SAMPLES, ids=[s.id for s in SAMPLES])
def test_logits_and_gradients(sample: Sample, backend: str, seed: int) -> None:
    leaves = [*sample.tensors(seed), axis_of(sample, seed)]
    logits, slots = rotated(leaves, backend, return_slots=True)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    every = written_out(*wide)
    truth = every.max(dim=2).values
    exact = logits.dtype == f64
    roundings = 1e-10 if exact else 2e-5
    assert error(logits, truth) <= roundings * float(wide[3].detach())
    assert error(every.gather(2, slots.long()[..., None])[..., 0], truth) <= 2 * roundings * float(
        wide[3].detach()
    )
    grad = torch.randn(sample.B, sample.K, generator=generator(seed + 1))
    ours = torch.autograd.grad(logits, leaves, grad.to(logits.dtype), allow_unused=True)
    chosen = every.gather(2, slots.long()[..., None])[..., 0]
    expected = torch.autograd.grad(chosen, wide, grad.double(), allow_unused=True)
    for name, leaf, value, true in zip(("x", "w", "δ", "τ", "u"), leaves, ours, expected, strict=True):
        if true is None:  # without displacements, axis has no effect
            assert value is None or not value.any()
            continue
        assert (value.dtype, value.shape) == (leaf.dtype, leaf.shape)
        eps = max(torch.finfo(leaf.dtype).eps, 1e-5 if not exact else 1e-11)
        # The sums over all pairs have terms of both signs.
        size = float(true.abs().max()) if true.numel() else 0.0
        size += float(grad.norm()) * (1 if name in ("τ", "u", "δ") else 0)
        assert error(value, true) <= 16 * eps * max(size, 1e-3), name


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_and_topk(reduction: str, fused: str, seed: int) -> None:
    sample = Sample(45, 640, 330, 3, f64, f64, f64)
    leaves = [*sample.tensors(seed), axis_of(sample, seed).detach().double().requires_grad_()]
    x, w, delta, tau, axis = leaves
    target = torch.randint(0, 640, (45,), generator=generator(seed))
    both: dict[str, Any] = {"transform": "rotation", "axis": axis, "backend": fused}
    loss = gistops.constellation_cross_entropy(x, w, delta, tau, target, reduction=reduction, **both)
    every = written_out(*leaves).max(dim=2).values
    truth = F.cross_entropy(every, target, reduction=reduction)
    torch.testing.assert_close(loss, truth)
    grad = torch.randn(loss.shape, dtype=f64, generator=generator(seed + 1))
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves, grad), torch.autograd.grad(truth, leaves, grad, retain_graph=True)
    )
    values, classes, _ = gistops.constellation_topk(x, w, delta, tau, 7, **both)
    torch.testing.assert_close(values, every.topk(7, dim=1).values)
    assert torch.equal(classes, every.topk(7, dim=1).indices)


def test_a_displacement_along_the_axis_turns_nothing(backend: str, seed: int) -> None:
    """If s is 0, v has no direction, and the gradients must stay finite."""
    x, w, delta, tau = Sample(9, 40, 16, 2).tensors(seed)
    axis = delta[0].detach().clone().requires_grad_()
    logits = rotated([x, w, delta[:1], tau, axis], backend)
    torch.testing.assert_close(logits, tau * F.normalize(x) @ F.normalize(w).T, atol=1e-4, rtol=1e-4)
    for gradient in torch.autograd.grad(logits.sum(), [x, w, tau, axis]):
        assert gradient.isfinite().all()


def test_zero_vectors(backend: str, seed: int) -> None:
    leaves = [*Sample(9, 40, 16, 2).tensors(seed), torch.randn(16)]
    with torch.no_grad():
        leaves[0][3] = 0
        leaves[1][5] = 0
    logits = rotated(leaves, backend)
    assert not logits[3].any()
    assert not logits[:, 5].any()
    for gradient in torch.autograd.grad(logits.square().sum(), leaves[:4]):
        assert gradient.isfinite().all()


def test_opcheck_gradcheck_and_compile(fused: str, seed: int) -> None:
    sample = Sample(37, 130, 20, 3)
    x, w, delta, tau = sample.tensors(seed)
    axis = axis_of(sample, seed)
    ops = backends.ops(fused)
    forward, backward = ops.rotation_forward.default, ops.rotation_backward.default
    turns = [torch.randn(4, 20, requires_grad=True), torch.randn(3, 3, requires_grad=True)]
    torch.library.opcheck(forward, (x, w, tau, *turns))
    frozen = [t.detach() for t in (x, w, tau, *turns)]
    saved = forward(*frozen)
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(backward, (torch.randn_like(saved[0]), *frozen, *saved, *needs))
    small = Sample(3, 5, 4, 2, f64, f64, f64)
    tensors = [t.detach().double().requires_grad_() for t in (*small.tensors(seed), axis_of(small, seed))]
    assert torch.autograd.gradcheck(lambda *t: rotated(list(t), fused), tensors)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *t: rotated(list(t), fused), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for rows in (37, 12):
        leaves = [x.detach()[:rows].requires_grad_(), w, delta, tau, axis]
        pair = [compiled(*leaves), rotated(leaves, fused)]
        torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)
        grad = torch.randn(rows, 130)
        torch.testing.assert_close(
            *(torch.autograd.grad(p, leaves, grad) for p in pair), atol=1e-4, rtol=1e-4
        )


def test_same_bits(fused: str, seed: int) -> None:
    sample = Sample(300, 1100, 67, 4)
    leaves = [*sample.tensors(seed), axis_of(sample, seed)]
    grad = torch.randn(300, 1100)
    first = [rotated(leaves, fused), *torch.autograd.grad(rotated(leaves, fused), leaves, grad)]
    for _ in range(3):
        torch.empty(1 << 20).normal_()
        again = [rotated(leaves, fused), *torch.autograd.grad(rotated(leaves, fused), leaves, grad)]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_errors_name_the_argument(backend: str) -> None:
    x, w, delta = torch.randn(3, 8), torch.randn(5, 8), torch.randn(2, 8)
    for axis, kind, words in (
        (None, TypeError, "axis: expected a torch.Tensor, got NoneType"),
        (torch.ones(7), ValueError, r"axis: expected shape \[8\] to match input, got \[7\]"),
        (torch.ones(8).long(), TypeError, "axis: expected float32, .* got torch.int64"),
        (torch.ones(8, device="meta"), ValueError, "axis: expected device .* got meta"),
    ):
        with pytest.raises(kind, match=words):
            gistops.constellation_logits(x, w, delta, 4.0, transform="rotation", axis=axis, backend=backend)
