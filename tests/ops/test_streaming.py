"""Tests of the chunked ops, which GPUs use, against the CPU's own kernels."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gistops.backends.chunked import ChunkedOps, scorers
from gistops.backends.rotation_coeffs import class_coeffs
from gistops.operators.cross_entropy_parts import PartsBackward, PartsForward
from gistops.operators.logits import (
    RotationBackward,
    RotationForward,
    SubcenterBackward,
    SubcenterForward,
)
from gistops.operators.topk import Topk

from .oracle import generator

pytestmark = pytest.mark.cpu  # compares with the CPU's kernels, on the CPU
KINDS = ("translation", "subcenters", "rotation")
f64 = torch.float64


@pytest.fixture(params=[1, 64 * 5, 1 << 22], ids=["chunks of 64", "uneven chunks", "one chunk"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorers, "CPU_CHUNK_ELEMENTS", 37 * request.param)


@pytest.fixture
def ops(fused: str) -> Any:
    """The namespace whose logits kernels are called in chunks."""
    return torch.ops.gistops


def arguments(kind: str, dtype: torch.dtype, seed: int, bias: bool = True) -> tuple[Tensor | None, ...]:
    """Return input, centers, displacements, tau, class_bias, directions, turns."""
    source = generator(seed)
    B, K, d, m = 37, 431, 24, 3

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source).to(dtype)

    rotation = (random(m, d) / d**0.5, random(3, m - 1)) if kind == "rotation" else (None, None)
    x, w = random(B, d), random(K, m, d) if kind == "subcenters" else random(K, d)
    if dtype == f64:  # zero vectors, whose gradients are of the size 1e12
        w[5], x[3] = 0, 0
    return (
        x,
        w,
        0.3 * random(m if kind == "translation" else 0, d),
        torch.tensor(9.0, dtype=dtype),
        random(K) if bias else None,
        *rotation,
    )


def near_ties(tensors: tuple[Tensor | None, ...]) -> Tensor:
    """Return a mask of the rows [B] in which the cosines of the two best slots of a class differ by less than 2e-6.

    Rounding decides there which slot gets the gradient.
    """
    x, w, delta, _, _, directions, turns = (None if t is None else t.double() for t in tensors)
    assert x is not None
    assert w is not None
    assert delta is not None
    x = F.normalize(x, dim=1)
    if directions is not None and turns is not None:  # rotations: each slot has the norm of w
        y, z = class_coeffs(directions, turns, w)
        f = x @ directions.T
        terms = f[:, :1, None] * y + f[:, 1:, None] * z
        scores = (x @ w.T)[:, None] + F.pad(terms, (0, 0, 1, 0))
        scores = scores / torch.linalg.vector_norm(w, dim=1)
    else:
        slots = w if w.dim() == 3 else torch.cat([w[:, None], w[:, None] + delta], dim=1)
        scores = torch.einsum("bd,kmd->bmk", x, F.normalize(slots, dim=2))
    best, second = scores.topk(2, dim=1).values.unbind(1)
    gap = best - second  # 0: the slots are equal, and the lowest gets the gradient
    return ((gap > 0) & (gap < 2e-6)).any(1)


def same(made: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    loose: dict[str, Any] = {"atol": 1e-11, "rtol": 1e-9} if dtype == f64 else {"atol": 2e-4, "rtol": 1e-4}
    assert len(made) == len(expected)
    for a, b in zip(made, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.dtype == torch.uint8 and dtype != f64:
            # Near-ties may go either way, as products of other sizes round differently: two of 4.8 million pairs over 150
            # seeds. The logits are compared all the same, and float64 allows no difference.
            assert (a != b).sum() <= 3
            continue
        torch.testing.assert_close(a, b, **loose, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, f64])
@pytest.mark.parametrize("options", [False, True], ids=["bare", "bias and weight"])
def test_loss(kind: str, dtype: torch.dtype, options: bool, chunk: None, ops: Any, seed: int) -> None:
    tensors = arguments(kind, dtype, seed, options)
    target = torch.randint(0, 431, (37,), generator=generator(seed))
    target[::5] = -100
    weight = torch.rand(431, generator=generator(seed)).to(dtype) if options else None
    ours = ChunkedOps(ops)
    made = ours.cross_entropy_parts_forward(PartsForward(*tensors, target, weight, -100))
    expected = ops.cross_entropy_parts_forward.default(*tensors, target, weight, -100)
    same(made, expected, dtype)
    grads = [torch.randn(t.shape, generator=generator(seed + i)).to(dtype) for i, t in enumerate(made)]
    if dtype != f64:
        for grad in grads:
            if grad.numel():
                grad[near_ties(tensors)] = 0
    for needs in ((True,) * 5, (True, False, False, False, False), (False, True, True, True, options)):
        same(
            ours.cross_entropy_parts_backward(
                PartsBackward(*grads, *tensors, target, weight, -100, expected[0], *needs)
            ),
            ops.cross_entropy_parts_backward.default(
                *grads, *tensors, target, weight, -100, expected[0], *needs
            ),
            dtype,
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 20, 431])
def test_topk(kind: str, k: int, chunk: None, ops: Any, seed: int) -> None:
    tensors = arguments(kind, f64, seed)
    made = ChunkedOps(ops).topk(Topk(*tensors, k, True))
    same(made, ops.topk.default(*tensors, k, True), f64)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_topk_of_equals(dtype: torch.dtype, chunk: None, ops: Any, seed: int) -> None:
    """Ties, zeros of both signs, NaNs and infinities come in the order of the CPU kernel, with its log-sum-exp."""
    source = generator(seed)
    values = torch.tensor([0.0, -0.0, 1.0, 1.0, -1.0, 1e-40, -torch.inf, torch.inf, torch.nan, -torch.nan])
    zeros = (torch.zeros(3, 4, dtype=dtype), torch.ones(431, 4, dtype=dtype), torch.empty(0, 4, dtype=dtype))
    for k, kinds in itertools.product((1, 100, 431), (7, 8, 10)):  # 7: without +inf, 8: without NaN
        bias = values[torch.randint(0, kinds, (431,), generator=source)].to(dtype)
        tensors = (*zeros, torch.tensor(1.0), bias, None, None)
        made = ChunkedOps(ops).topk(Topk(*tensors, k, True))
        expected = ops.topk.default(*tensors, k, True)
        assert torch.equal(made[1], expected[1])
        torch.testing.assert_close(made[0], expected[0], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(made[3], expected[3], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_subcenter_logits(dtype: torch.dtype, chunk: None, ops: Any, seed: int) -> None:
    x, w, _, tau = arguments("subcenters", dtype, seed)[:4]
    ours = ChunkedOps(ops)
    made = ours.subcenter_forward(SubcenterForward(x, w, tau))
    expected = ops.subcenter_forward.default(x, w, tau)
    same(made, expected, dtype)
    grad = torch.randn(made[0].shape, generator=generator(seed)).to(dtype)
    for needs in ((True,) * 3, (True, False, False), (False, True, True)):
        same(
            ours.subcenter_backward(SubcenterBackward(grad, x, w, tau, *expected, *needs)),
            ops.subcenter_backward.default(grad, x, w, tau, *expected, *needs),
            dtype,
        )


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_rotation_logits(dtype: torch.dtype, chunk: None, ops: Any, seed: int) -> None:
    x, w, _, tau, _, *coeffs = arguments("rotation", dtype, seed)
    ours = ChunkedOps(ops)
    made = ours.rotation_forward(RotationForward(x, w, tau, *coeffs))
    expected = ops.rotation_forward.default(x, w, tau, *coeffs)
    same(made, expected, dtype)
    grad = torch.randn(made[0].shape, generator=generator(seed)).to(dtype)
    for needs in ((True,) * 3, (True, False, False), (False, True, False)):
        same(
            ours.rotation_backward(RotationBackward(grad, x, w, tau, *coeffs, *expected, *needs)),
            ops.rotation_backward.default(grad, x, w, tau, *coeffs, *expected, *needs),
            dtype,
        )


def test_chunks_bound_the_scores(monkeypatch: pytest.MonkeyPatch, ops: Any, seed: int) -> None:
    """A chunk has at most CPU_CHUNK_ELEMENTS scores."""
    monkeypatch.setattr(scorers, "CPU_CHUNK_ELEMENTS", 37 * 100)
    x, w, delta, tau = arguments("translation", torch.float32, seed)[:4]
    scorer = scorers.make_scorer(ops, Topk(x, w, delta, tau, None, None, None, 1))
    assert [(c.start, c.stop) for c in scorer.chunks()] == [
        (s, min(s + 100, 431)) for s in range(0, 431, 100)
    ]
