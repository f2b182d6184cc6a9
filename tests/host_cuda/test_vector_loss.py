"""The public losses of sub-centers and rotations with the host-compiled CUDA kernels as ops on CPU tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gistops
from gistops import backends
from gistops._classifier import no_displacements
from gistops.backends import eager_loss
from tests.ops.oracle import error
from tests.ops.test_half_gradients import check_rounded_once
from tests.ops.vector_oracle import VectorSample, by_definition

from .test_eager_loss import register

FORMS = ("subcenters", "rotation")
OPTIONS: dict[str, Any] = {"margin": 0.3, "margin_kind": "angle", "label_smoothing": 0.1}


@pytest.fixture
def host_ops(module: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the public functions choose the CUDA backend, whose kernels run on the host."""
    ops = register(module)
    monkeypatch.setattr(backends, "choose", lambda *_: "cuda")
    monkeypatch.setattr(backends, "ops", lambda _: ops)
    return ops


def public_loss(tensors: list[Tensor], target: Tensor, **options: Any) -> Any:
    x, w, tau, *turns = tensors
    if not turns:
        return gistops.subcenter_cross_entropy(x, w, tau, target, **options)
    return gistops.constellation_cross_entropy(
        x, w, turns[0], tau, target, transform="rotation", axis=turns[1], **options
    )


@pytest.mark.usefixtures("host_ops")
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients(form: str, keep: bool, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    if not keep:
        monkeypatch.setattr(eager_loss, "MAX_KEPT_BYTES", 0)
    tensors = VectorSample(form, 20, 40, 4, 24).tensors(seed)
    target, bias = torch.arange(20), torch.rand(40, requires_grad=True)
    loss, lse = public_loss(tensors, target, class_bias=bias, return_lse=True, **OPTIONS)
    assert "_FunctionBackward" in type(loss.grad_fn).__name__  # the whole loss, not its parts
    options = OPTIONS | {"class_bias": bias.detach(), "margin": torch.tensor(OPTIONS["margin"])}
    true_loss, true_lse, wide = by_definition(tensors, target, options, torch.float64)
    assert error(loss, true_loss) <= 1e-4 * (1 + float(true_loss.detach()))
    assert error(lse, true_lse) <= 1e-4 * (1 + float(true_lse.detach().abs().max()))
    leaves = [*tensors, bias]
    found = torch.autograd.grad(loss + lse.sum(), leaves)
    expected = torch.autograd.grad(true_loss + true_lse.sum(), wide[: len(leaves)])
    for leaf, value, true in zip(leaves, found, expected, strict=True):
        assert value.dtype == leaf.dtype
        assert error(value, true) <= 1e-3 * (1 + float(true.abs().max()))
    with torch.no_grad():
        frozen, _ = public_loss(tensors, target, class_bias=bias, return_lse=True, **OPTIONS)
    torch.testing.assert_close(frozen, loss)


@pytest.mark.usefixtures("host_ops")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rotations_in_half_precision(dtype: torch.dtype, seed: int) -> None:
    """The op takes input and centers as they are; only their gradients come from rounded weights."""
    loss = public_loss(VectorSample("rotation", 5, 20, 3, 8, dtype).tensors(seed), torch.arange(5))
    assert [t.dtype for t in loss.grad_fn.saved_tensors[:2]] == [dtype, dtype]
    check_rounded_once("rotation", "cosine", dtype, "cuda", seed, rows=40)


@pytest.mark.usefixtures("host_ops")
@pytest.mark.parametrize("form", FORMS)
def test_an_lse_that_is_changed_in_place(form: str, seed: int) -> None:
    tensors = VectorSample(form, 6, 12, 3, 20).tensors(seed)
    (expected,) = torch.autograd.grad(public_loss(tensors, torch.arange(6)), tensors[0])
    loss, lse = public_loss(tensors, torch.arange(6), return_lse=True)
    lse *= 2
    torch.testing.assert_close(torch.autograd.grad(loss, tensors[0])[0], expected)


@pytest.mark.usefixtures("host_ops")
@pytest.mark.parametrize("form", FORMS)
def test_a_tensor_changed_before_the_backward_raises(form: str, seed: int) -> None:
    for i in range(3 if form == "subcenters" else 5):
        tensors = VectorSample(form, 6, 12, 3, 20).tensors(seed)
        loss = public_loss(tensors, torch.arange(6))
        with torch.no_grad():
            tensors[i].mul_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_ops(form: str, keep: bool, host_ops: Any, seed: int) -> None:
    x, w, tau, *turns = VectorSample(form, 5, 20, 3, 8).tensors(seed)
    coeffs = (None, None)
    if turns:
        coeffs = (torch.randn(5, 3, requires_grad=True), torch.randn(2, 3, 20, requires_grad=True))
    bias = torch.randn(20, requires_grad=True)
    arguments = (x, w, no_displacements(x), tau, *coeffs, torch.arange(5), bias, None, None)
    options = (0, 1, -100, 0.1)
    forward, backward = host_ops.cross_entropy_forward.default, host_ops.cross_entropy_backward.default
    torch.library.opcheck(forward, (*arguments, *options, keep))
    with torch.no_grad():
        made = forward(*arguments, *options, keep)
    frozen = [t.detach() if isinstance(t, Tensor) else t for t in arguments]
    grads = (torch.randn_like(made[0]), torch.randn_like(made[1]))
    saved = (made[1], *made[3:])
    torch.library.opcheck(backward, (*grads, *frozen, *saved, *options, *[True] * 6))
