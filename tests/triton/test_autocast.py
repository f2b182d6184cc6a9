"""A backward inside an autocast region. Run by test_interpreter.py, and with `--device cuda` on a GPU."""

from __future__ import annotations

import pytest
import torch

import gistops
from tests.ops.oracle import Sample, allowed, error, gradients, leaves, routed

from .conftest import INTERPRETED

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1"
)
half, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize("autocast", [half, bf16])
@pytest.mark.parametrize("dtype", [f32, half, bf16, f64])
def test_backward_inside_autocast(
    dtype: torch.dtype, autocast: torch.dtype, seed: int, request: pytest.FixtureRequest
) -> None:
    """Autocast would turn the operands of torch.mm into half precision, and kernels read its result."""
    device = "cpu" if INTERPRETED else request.config.getoption("--device")
    if device == "cpu" and not INTERPRETED:
        pytest.skip("needs --device cuda")
    tensors = Sample(33, 47, 35, 2, dtype, dtype, dtype).tensors(seed)
    logits, slots = gistops.constellation_logits(*tensors, return_slots=True, backend="triton")
    grad = torch.randn(logits.shape, dtype=logits.dtype)
    outside = torch.autograd.grad(logits, tensors, grad, retain_graph=True)
    with torch.autocast(device, dtype=autocast):
        inside = torch.autograd.grad(logits, tensors, grad)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    expected = gradients(lambda *t: routed(*t, slots), leaves(tensors, f64), grad)
    for value, true, tensor in zip(inside[:3], expected[:3], tensors[:3], strict=True):
        assert error(value, true) <= allowed(0.0, true, tensor.dtype, 33 * 47)


def test_a_product_of_another_dtype_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from gistops.backends.triton import launch_args

    narrow = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **_: narrow(a, b).half())
    with pytest.raises(RuntimeError, match=r"expected to write torch\.float32"):
        launch_args.multiply(torch.ones(2, 3), torch.ones(3, 2), torch.empty(2, 2))
