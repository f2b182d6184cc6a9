"""A backward inside an autocast region, where many training loops call it: autocast must not change the gradients.

Without `below_autocast`, autocast casts the matrix products that an op computes through the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import gistops
from gistops.backends.chunked.scorers import make_scorer
from gistops.operators import registry
from gistops.operators.logits import LOGITS_FORWARD, Logits, LogitsForward

from .oracle import Sample, generator

half, bf16, f64 = torch.float16, torch.bfloat16, torch.float64
SIZES = (37, 67, 40, 3)
AUTOCAST_KEYS = (torch._C.DispatchKey.AutocastCPU, torch._C.DispatchKey.AutocastCUDA)

CALLS: dict[str, Callable[[list[Tensor], str], Tensor]] = {
    "logits": lambda t, backend: gistops.constellation_logits(*t[:4], backend=backend),
    "loss": lambda t, backend: gistops.constellation_cross_entropy(
        *t[:4], torch.arange(37), reduction="none", label_smoothing=0.1, class_bias=t[5], backend=backend
    ),
    "subcenters": lambda t, backend: gistops.subcenter_cross_entropy(
        t[0], t[4], t[3], torch.arange(37), reduction="none", backend=backend
    ),
    "rotation": lambda t, backend: gistops.constellation_logits(
        *t[:4], transform="rotation", axis=t[4][0, 0], backend=backend
    ),
}


@pytest.mark.parametrize("region", [bf16, half])
@pytest.mark.parametrize("dtype", [torch.float32, bf16, half, f64])
@pytest.mark.parametrize("name", CALLS)
def test_backward_inside_autocast(
    name: str, dtype: torch.dtype, region: torch.dtype, fused: str, device: str, seed: int
) -> None:
    x, w, delta, tau = Sample(*SIZES, dtype, dtype, dtype).tensors(seed)
    source = generator(seed + 1)
    subcenters = (torch.randn(67, 2, 40, generator=source) / 6).to(dtype).requires_grad_()
    bias = torch.randn(67, generator=source, requires_grad=True)
    leaves = [x, w, delta, tau, subcenters, bias]
    made = CALLS[name](leaves, fused)
    grad = torch.randn(made.shape, generator=source).to(made.dtype)
    expected = torch.autograd.grad(made, leaves, grad, allow_unused=True)
    made = CALLS[name](leaves, fused)
    with torch.autocast(device, region):
        inside = torch.autograd.grad(made, leaves, grad, allow_unused=True)
    for a, b in zip(inside, expected, strict=True):
        assert (a is None) == (b is None)
        if a is None or b is None:
            continue
        assert a.dtype == b.dtype
        if name == "rotation":  # its coefficients are products of torch, whose backward is cast
            torch.testing.assert_close(a, b, atol=0.03 * float(b.abs().max()), rtol=0)
        else:
            assert torch.equal(a, b)


@pytest.mark.cuda
@pytest.mark.parametrize("region", [bf16, half])
@pytest.mark.parametrize("name", CALLS)
def test_all_of_a_step_inside_autocast(name: str, region: torch.dtype, fused: str, seed: int) -> None:
    """A GPU multiplies in the dtype of autocast: results are those of rounded tensors, in float32."""
    x, w, delta, tau = Sample(*SIZES).tensors(seed)
    source = generator(seed + 1)
    subcenters = (torch.randn(67, 2, 40, generator=source) / 6).requires_grad_()
    bias = torch.randn(67, generator=source, requires_grad=True)
    leaves = [x, w, delta, tau, subcenters, bias]
    with torch.autocast("cuda", region):
        made = CALLS[name](leaves, fused)
        assert made.dtype == torch.float32
        ours = torch.autograd.grad(made.square().sum(), leaves, allow_unused=True)
    rounded = [t if t is tau or t is bias else t.detach().to(region).requires_grad_() for t in leaves]
    expected = CALLS[name](rounded, fused)
    most = (
        0.03 * float(expected.abs().max()) if name == "rotation" else 2e-4
    )  # its coefficients use unrounded tensors
    torch.testing.assert_close(made, expected, atol=most, rtol=1e-4)
    if name == "rotation":  # another slot may win and take the gradient
        return
    theirs = torch.autograd.grad(expected.square().sum(), rounded, allow_unused=True)
    for leaf, a, b in zip(leaves, ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.dtype == leaf.dtype
            torch.testing.assert_close(a, b.float(), atol=0.03 * float(b.abs().max()), rtol=0)


def test_chunks_call_their_kernels_below_autocast(device: str) -> None:
    """A backward inside autocast recomputes the scores without a cast."""
    excluded = []

    def forward(a: LogitsForward) -> Logits:
        excluded.extend(torch._C._dispatch_tls_is_dispatch_key_excluded(key) for key in AUTOCAST_KEYS)
        batch, classes = a.input.shape[0], a.centers.shape[0]
        new = a.input.new_zeros
        return Logits(new(batch, classes), new(batch, classes), new(1, classes), new(batch))

    ops = torch.ops.gistops_autocast_probe
    registry.define(ops, LOGITS_FORWARD, forward, ("CPU", "CUDA"))
    tensors = (torch.ones(2, 4), torch.ones(3, 4), torch.ones(0, 4), torch.ones(()))
    with torch.autocast(device, bf16):
        make_scorer(ops, LogitsForward(*tensors)).forward(slice(0, 3))
    assert excluded == [True, True]
