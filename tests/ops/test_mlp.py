"""Centers moved by an MLP: logits, loss and top-k in chunks against materialized vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gistops
from gistops.functional.transforms import mlp as mlp_transform
from gistops.nn import ConstellationClassifier

from .oracle import Sample, generator

f64 = torch.float64
SIZES = Sample(21, 90, 12, 3, f64, f64, f64)


@pytest.fixture(params=[12 * 4 * 25, 1 << 24], ids=["four chunks", "one chunk"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp_transform, "CHUNK_ELEMENTS", request.param)


def leaves_of(seed: int, dtype: torch.dtype = f64, sample: Sample = SIZES) -> list[Tensor]:
    """Return x, w, δ, τ, A and B."""
    source = generator(seed + 7)
    hidden = 9
    both = (
        torch.randn(hidden, 2 * sample.d, generator=source),
        torch.randn(sample.d, hidden, generator=source),
    )
    every = [*sample.tensors(seed, requires_grad=False), both[0], 0.1 * both[1]]
    return [t.to(dtype).requires_grad_() for t in every]


def written_out(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return all scores [B, K, M], each vector from the definition."""
    every = [w]
    for j in range(len(delta)):
        entry = torch.stack([torch.cat([F.normalize(v, dim=0), delta[j]]) for v in w])
        every.append(w + torch.relu(entry @ first.T) @ second.T)
    cosines = torch.einsum("bd,kmd->bkm", F.normalize(x), F.normalize(torch.stack(every, 1), dim=2))
    return tau * cosines


def arguments(leaves: list[Tensor], backend: str) -> tuple[list[Tensor], dict[str, Any]]:
    return leaves[:4], {"transform": "mlp", "mlp": (leaves[4], leaves[5]), "backend": backend}


def test_logits(chunk: None, backend: str, seed: int) -> None:
    leaves = leaves_of(seed)
    tensors, more = arguments(leaves, backend)
    logits, slots = gistops.constellation_logits(*tensors, return_slots=True, **more)
    truth, winner = written_out(*leaves).max(dim=2)
    torch.testing.assert_close(logits, truth)
    assert torch.equal(slots, winner.to(torch.uint8))
    assert len(slots.unique()) == 4, "a slot wins nowhere: the test tests little"
    grad = torch.randn(21, 90, dtype=f64)
    torch.testing.assert_close(
        torch.autograd.grad(logits, leaves, grad), torch.autograd.grad(truth, leaves, grad)
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", [False, True], ids=["bare", "every option"])
def test_loss(options: bool, reduction: str, chunk: None, backend: str, seed: int) -> None:
    leaves = [*leaves_of(seed), torch.randn(90, dtype=f64, requires_grad=True)]
    tensors, more = arguments(leaves, backend)
    weight = torch.rand(90, dtype=f64)
    target = torch.randint(0, 90, (21,))
    target[3] = -100
    truth = written_out(*leaves[:6]).max(dim=2).values
    if options:
        more |= {"class_bias": leaves[6], "weight": weight, "label_smoothing": 0.1, "margin": 0.2}
        truth = truth - 0.2 * F.one_hot(target.clamp(min=0), 90) * (target >= 0)[:, None] + leaves[6]
    loss, lse = gistops.constellation_cross_entropy(
        *tensors, target, reduction=reduction, return_lse=True, **more
    )
    expected = F.cross_entropy(
        truth, target, weight if options else None, reduction=reduction, label_smoothing=0.1 * options
    )
    torch.testing.assert_close((loss, lse), (expected, truth.logsumexp(1)))
    grads = [torch.randn(loss.shape, dtype=f64), torch.randn(21, dtype=f64)]
    used = leaves if options else leaves[:6]
    torch.testing.assert_close(
        torch.autograd.grad([loss, lse], used, grads),
        torch.autograd.grad([expected, truth.logsumexp(1)], used, grads),
    )


def test_topk(chunk: None, backend: str, seed: int) -> None:
    leaves = leaves_of(seed)
    tensors, more = arguments(leaves, backend)
    bias = torch.randn(90, dtype=f64)
    values, classes, slots, lse = gistops.constellation_topk(
        *tensors, 40, class_bias=bias, return_lse=True, **more
    )
    every = written_out(*leaves) + bias[:, None]
    truth, winner = every.max(dim=2)
    torch.testing.assert_close(values, truth.topk(40, dim=1).values)
    assert torch.equal(classes, truth.topk(40, dim=1).indices)
    assert torch.equal(slots, winner.gather(1, classes).to(torch.uint8))
    torch.testing.assert_close(lse, truth.logsumexp(1))


def test_float32_and_no_displacements(chunk: None, backend: str, seed: int) -> None:
    leaves = leaves_of(seed, torch.float32)
    tensors, more = arguments(leaves, backend)
    truth = written_out(*[t.double() for t in leaves]).max(dim=2).values
    logits = gistops.constellation_logits(*tensors, **more)
    torch.testing.assert_close(logits, truth.float(), atol=1e-4, rtol=1e-4)
    tensors[2] = tensors[2][:0]
    torch.testing.assert_close(
        gistops.constellation_logits(*tensors, **more),
        gistops.constellation_logits(*tensors, backend=more["backend"]),
    )


def test_compile_without_a_graph_break(chunk: None, fused: str, seed: int) -> None:
    leaves = leaves_of(seed)
    target = torch.randint(0, 90, (21,))

    def loss(*leaves: Tensor) -> Tensor:
        tensors, more = arguments(list(leaves), fused)
        made = gistops.constellation_cross_entropy(*tensors, target, **more)
        assert isinstance(made, Tensor)
        return made

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves)
    )


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool, seed: int) -> None:
    head = ConstellationClassifier(12, 90, 3, transform="mlp").eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(head, (torch.randn(4, 12),), dynamic_shapes=({0: batch},), strict=strict)
    x = torch.randn(9, 12)
    torch.testing.assert_close(program.module()(x), head(x))


def test_errors_name_the_argument(backend: str) -> None:
    x, w, delta = torch.randn(3, 8), torch.randn(5, 8), torch.randn(2, 8)
    first, second = torch.randn(6, 16), torch.randn(8, 6)
    cases: list[tuple[Any, type[Exception], str]] = [
        (None, TypeError, "mlp: expected a tuple of two tensors, got NoneType"),
        ((first,), TypeError, "mlp: expected a tuple of two tensors, got tuple"),
        ((first.long(), second), TypeError, r"mlp\[0\]: expected float32, .* got torch.int64"),
        ((first[:, :8], second), ValueError, r"mlp\[0\]: expected shape \[h, 16\] .* got \[6, 8\]"),
        ((first, second.T), ValueError, r"mlp\[1\]: expected shape \[8, 6\], got \[6, 8\]"),
        ((first, second.to("meta")), ValueError, r"mlp\[1\]: expected device .* got meta"),
    ]
    for mlp, kind, words in cases:
        with pytest.raises(kind, match=words):
            gistops.constellation_logits(x, w, delta, 4.0, transform="mlp", mlp=mlp, backend=backend)
    with pytest.raises(ValueError, match="mlp: expected None unless transform='mlp'"):
        gistops.constellation_logits(x, w, delta, 4.0, mlp=(first, second), backend=backend)
