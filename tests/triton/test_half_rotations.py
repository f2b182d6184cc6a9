"""The loss of rotations with vectors in half precision, as under autocast. Run by test_interpreter.py.

H' is rounded to float16 for the products that give the gradients of input and centers. The gradients of the coefficients,
and so of displacements and axis, are sums in float32 of the H' that is not rounded. The interpreter does not round to
bfloat16.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gistops
from gistops._classifier import Classifier, no_displacements
from gistops.functional.transforms import rotation
from tests.ops.oracle import allowed, error
from tests.ops.vector_oracle import VectorSample, by_definition

from .conftest import INTERPRETED

if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1; test_interpreter.py runs this file", allow_module_level=True)

half, f32, f64 = torch.float16, torch.float32, torch.float64


def loss_of(leaves: list[Tensor], target: Tensor) -> Tensor:
    """Return the loss of an op that gets input and centers in float16, and the coefficients in float32."""
    x, w, tau, delta, axis = leaves
    assert gistops.backends.choose("cpu", "triton") == "triton"  # which defines the ops
    wide_x, wide_w, *coeffs = rotation.coefficients(
        x.to(f32), Classifier(w.to(f32), delta, tau, "rotation", axis)
    )
    loss: Tensor = torch.ops.gistops_triton.cross_entropy_forward.default(
        wide_x.to(half), wide_w.to(half), no_displacements(x.to(half)), tau, *coeffs, target, None, None, None, 0, 1, -100, 0.0, True
    )[0]  # fmt: skip
    return loss


@pytest.mark.parametrize("tiles", ["small"], indirect=True)
@pytest.mark.parametrize(
    ("M", "frozen", "zeros"), [(3, False, False), (3, True, False), (3, False, True), (1, False, False)]
)
def test_coefficients_get_gradients_from_weights_that_are_not_rounded(
    M: int, frozen: bool, zeros: bool, tiles: str, seed: int
) -> None:
    """A zero vector has weights of about 1e12, beyond float16. Its own gradient in float16 has no meaning."""
    tensors = [t.detach() for t in VectorSample("rotation", 21, 40, M, 24, half).tensors(seed)]
    if zeros:
        tensors[0][3], tensors[1][5] = 0, 0
    target = torch.arange(21) + 10
    first = 2 if frozen else 0  # the first leaf that needs a gradient
    leaves = [t.clone().requires_grad_(i >= first) for i, t in enumerate(tensors)]
    loss = loss_of(leaves, target)
    found = torch.autograd.grad(loss, leaves[first:])
    (right, _, wide), (narrow, _, plain) = (by_definition(tensors, target, {}, dtype) for dtype in (f64, f32))
    assert error(loss, right) <= 1e-5 * (1 + float(right.detach().abs()))
    # Without displacements the axis has no part in the definition.
    expected = torch.autograd.grad(right, wide[first:], materialize_grads=True)
    rounded = torch.autograd.grad(narrow, plain[first:], materialize_grads=True)
    for i, value, true, near in zip(range(first, 5), found, expected, rounded, strict=True):
        others = torch.ones(value.shape, dtype=torch.bool)
        if zeros and i < 2:
            others[(3, 5)[i]] = False
        near, true = near[others], true[others]
        bound = allowed(error(near, true), true, half if i < 2 else f32, 21 * 40 if i == 2 else 40)
        bound += 16 * torch.finfo(f32).eps * 21 if i == 2 else 0.0  # the terms of the sum for tau cancel
        assert error(value[others], true) <= bound, i
