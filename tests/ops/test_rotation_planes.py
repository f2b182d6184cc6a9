"""The planes of rotations by the op of the CPU, against those by PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gistops import backends
from gistops.backends import cpu_planes
from gistops.functional.transforms.rotation import plane

from .oracle import generator

pytestmark = pytest.mark.cpu
f32, f64 = torch.float32, torch.float64


@pytest.fixture(autouse=True)
def loaded() -> None:
    """Load the compiled ops."""
    assert backends.why_not("cpu") is None


def vectors(d: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return displacements at all kinds of angles to the axis, and the axis."""
    source = generator(seed)
    random = torch.randn(9, d, generator=source, dtype=f64)
    axis = torch.randn(d, generator=source, dtype=f64)
    random[1] += 2 * axis  # acute
    random[2] -= 2 * axis  # obtuse
    random[3] = 0
    random[4] = 1e-13
    random[5] = axis
    random[6] = -axis
    random[7] = -3 * axis
    random[8] = -axis + 1e-4 * random[8]
    return random, axis


def by_torch(displacements: Tensor, axis: Tensor) -> tuple[Tensor, Tensor]:
    u, p, *turns = plane(displacements, axis)
    return torch.cat([u[None], p]), torch.stack(turns)


def amplification(displacements: Tensor, axis: Tensor) -> float:
    """Return by how much rounding errors can grow: r is divided by its norm s, and in the gradient by s again."""
    u, v = F.normalize(axis, dim=0, eps=1e-12), F.normalize(displacements, dim=1, eps=1e-12)
    c = v @ u
    s = torch.linalg.vector_norm(v - c[:, None] * u, dim=1)
    divisor = torch.where((c < 0) & (s > 1e-12), s, 1)
    return float((1 / divisor**2).amax()) if len(divisor) else 1.0


def check(displacements: Tensor, axis: Tensor, seed: int) -> None:
    leaves = [t.clone().requires_grad_() for t in (displacements, axis)]
    made, expected = cpu_planes.directions_and_turns(*leaves, f64), by_torch(*leaves)
    grads = [torch.randn(t.shape, generator=generator(seed + 1), dtype=f64) for t in made]
    ours, truth = (torch.autograd.grad(outputs, leaves, grads) for outputs in (made, expected))
    size = 1 / min(1.0, float(axis.norm()) or 1.0, *(float(x.norm()) or 1.0 for x in displacements))
    bound = 1e-13 * size * amplification(displacements, axis)
    for a, b in zip((*made, *ours), (*expected, *truth), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        torch.testing.assert_close(a, b, rtol=0, atol=bound)


@pytest.mark.parametrize("d", [2, 23, 600])
def test_all_angles(d: int, seed: int) -> None:
    displacements, axis = vectors(d, seed)
    for i in range(
        len(displacements)
    ):  # one alone: the gradients of the last would hide the others' of the axis
        check(displacements[i : i + 1], axis, seed)
    check(displacements, axis, seed)
    check(displacements[:0], axis, seed)
    check(displacements[:3], 0 * axis, seed)


def test_one_dimension(seed: int) -> None:
    for sign in (-1.0, 1.0):
        made, expected = (
            function(torch.tensor([[-2.0], [3.0]], dtype=f64), torch.tensor([sign], dtype=f64))
            for function in (lambda *t: cpu_planes.directions_and_turns(*t, f64), by_torch)
        )
        assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


@pytest.mark.parametrize("dtype", [f32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype, seed: int) -> None:
    """The op computes in float64 and rounds its outputs once."""
    displacements, axis = (t.to(dtype) for t in vectors(40, seed))
    displacements = displacements[:5]  # the others are nearly opposite to the axis, or not, by their rounding
    wide = [t.double().requires_grad_() for t in (displacements, axis)]
    leaves = [t.clone().requires_grad_() for t in (displacements, axis)]
    made, truth = cpu_planes.directions_and_turns(*leaves, f32), by_torch(*wide)
    grads = [torch.randn(t.shape, generator=generator(seed)) for t in made]
    ours = torch.autograd.grad(made, leaves, grads)
    expected = torch.autograd.grad(truth, wide, [g.double() for g in grads])
    for a, b in zip(
        (*made, *ours), (*(t.float() for t in truth), *(t.to(dtype) for t in expected)), strict=True
    ):
        assert a.dtype == b.dtype
        rounding = 2 * torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=rounding, atol=rounding * 1e-3 * float(b.detach().abs().max()))


def test_what_is_not_finite(seed: int) -> None:
    displacements, axis = vectors(9, seed)
    displacements[1, 3] = torch.inf
    displacements[2, 0] = torch.nan
    displacements[5] *= 1e200
    made, expected = cpu_planes.directions_and_turns(displacements, axis, f64), by_torch(displacements, axis)
    for a, b in zip(made, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_frozen_arguments_and_several_upstream_gradients(seed: int) -> None:
    displacements, axis = vectors(12, seed)
    displacements.requires_grad_()
    made = cpu_planes.directions_and_turns(displacements, axis, f64)
    rows = torch.randn(3, *made[0].shape, generator=generator(seed), dtype=f64)
    (batched,) = torch.autograd.grad(made[0], displacements, rows, is_grads_batched=True, retain_graph=True)
    for i, row in enumerate(rows):
        (alone,) = torch.autograd.grad(made[0], displacements, row, retain_graph=True)
        torch.testing.assert_close(batched[i], alone)
    with torch.no_grad():
        assert not cpu_planes.directions_and_turns(displacements, axis, f64)[0].requires_grad


def test_opcheck(seed: int) -> None:
    displacements, axis = vectors(12, seed)
    forward, backward = (
        torch.ops.gistops.rotation_planes.default,
        torch.ops.gistops.rotation_planes_backward.default,
    )
    torch.library.opcheck(forward, (displacements, axis, f32))
    grads = torch.randn(10, 12), torch.randn(3, 9)
    torch.library.opcheck(backward, (*grads, displacements, axis))
