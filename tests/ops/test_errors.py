"""Errors name the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gistops

from .oracle import operators

x, w, delta, tau = torch.randn(3, 8), torch.randn(5, 8), torch.randn(2, 8), torch.tensor(16.0)
meta = torch.device("meta")

CASES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": np.zeros((3, 8))}, TypeError, "input: expected a torch.Tensor, got ndarray"),
    ({"centers": None}, TypeError, "centers: expected a torch.Tensor, got NoneType"),
    ({"displacements": [[0.0] * 8]}, TypeError, "displacements: expected a torch.Tensor, got list"),
    ({"tau": "16"}, TypeError, "tau: expected a tensor of one element or a finite number above 0, got str"),
    ({"tau": True}, TypeError, "tau: expected a tensor of one element or a finite number above 0, got bool"),
    ({"input": x.long()}, TypeError, "input: expected float32, float16, bfloat16 or float64, got torch.int64"),
    ({"centers": w.to(torch.complex64)}, TypeError, "centers: expected float32, .* got torch.complex64"),
    ({"displacements": delta.bool()}, TypeError, "displacements: expected float32, .* got torch.bool"),
    ({"tau": torch.tensor(16)}, TypeError, "tau: expected float32, .* got torch.int64"),
    ({"input": x.to_sparse()}, TypeError, r"input: expected a dense \(strided\) tensor, got layout torch.sparse"),
    ({"input": torch.nested.nested_tensor([x, x])}, TypeError, "input: expected a dense tensor, got a nested one"),
    ({"centers": w.to_sparse_csr()}, TypeError, r"centers: expected a dense \(strided\) tensor"),
    ({"input": x[0, 0]}, ValueError, r"input: expected shape \[\.\.\., d\] with d >= 1, got \[\]"),
    ({"input": x[:, :0]}, ValueError, r"input: expected shape \[\.\.\., d\] with d >= 1, got \[3, 0\]"),
    ({"centers": w[:, :7]}, ValueError, r"centers: expected shape \[K, 8\] to match input's last dim.* got \[5, 7\]"),
    ({"centers": w[0]}, ValueError, r"centers: expected shape \[K, 8\] .* got \[8\]"),
    ({"centers": w.T}, ValueError, r"centers: expected shape \[K, 8\] .* got \[8, 5\]"),
    ({"displacements": delta[:, :4]}, ValueError, r"displacements: expected shape \[m, 8\] .* got \[2, 4\]"),
    ({"displacements": delta[None]}, ValueError, r"displacements: expected shape \[m, 8\] .* got \[1, 2, 8\]"),
    ({"displacements": torch.randn(256, 8)}, ValueError, r"displacements: expected at most 255 rows .* got \[256, 8\]"),
    ({"tau": torch.ones(2)}, ValueError, r"tau: expected a tensor of one element, got shape \[2\]"),
    ({"tau": torch.ones(0)}, ValueError, r"tau: expected a tensor of one element, got shape \[0\]"),
    ({"centers": w.to(meta)}, ValueError, "centers: expected device .* to match input, got meta"),
    ({"displacements": delta.to(meta)}, ValueError, "displacements: expected device .* to match input, got meta"),
    ({"tau": tau.to(meta)}, ValueError, "tau: expected device .* to match input, got meta"),
    ({"backend": "gpu"}, ValueError, "backend: expected None or one of 'cpu', 'cuda', 'triton', 'reference', got 'gpu'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "words"), CASES, ids=[c[2][:40] for c in CASES])
def test_messages(change: dict[str, Any], kind: type[Exception], words: str, backend: str) -> None:
    arguments = {"input": x, "centers": w, "displacements": delta, "tau": tau, "backend": backend} | change
    with pytest.raises(kind, match=words):
        gistops.constellation_logits(**arguments)


def test_numbers_beyond_the_dtype_are_infinite(backend: str) -> None:
    """The product of a float32 tensor and such a number is infinite too."""
    ones = gistops.constellation_logits(x, w, delta, 1.0, backend=backend)
    logits = gistops.constellation_logits(x, w, delta, 1e40, backend=backend)
    assert torch.equal(logits, ones * 1e40)
    target = torch.tensor([0, 1, 2])
    lowered = torch.where(F.one_hot(target, 5).bool(), ones - 1e40, ones)
    loss = gistops.constellation_cross_entropy(x, w, delta, 1.0, target, margin=1e40, backend=backend)
    assert torch.equal(loss, F.cross_entropy(lowered, target))  # type: ignore[arg-type]


def test_ops_called_directly_are_memory_safe(fused: str) -> None:
    """Ops that are called directly raise an error instead of reading out of bounds."""
    if fused == "triton":
        pytest.skip("Triton's wrappers are Python: no memory is at stake")
    forward, backward = operators(fused)
    with pytest.raises(RuntimeError, match="centers: expected shape"):
        forward(x, w[:, :7], delta, tau)
    with pytest.raises(RuntimeError, match="tau: expected one element"):
        forward(x, w, delta, torch.ones(2))
    with pytest.raises(RuntimeError, match="expected float32"):
        forward(x.long(), w, delta, tau)
    saved = forward(x, w, delta, tau)
    with pytest.raises(RuntimeError, match=r"grad: expected .*shape"):
        backward(torch.ones(3, 4), x, w, delta, tau, *saved, True, True, True, True)
    with pytest.raises(RuntimeError, match=r"center_rnorms: expected .*shape"):
        backward(saved[0], x, w, delta, tau, *saved[:2], saved[2].T, saved[3], True, True, True, True)


def test_second_derivatives_name_the_reference(fused: str) -> None:
    leaf = x.clone().requires_grad_()
    logits = gistops.constellation_logits(leaf, w, delta, tau, backend=fused)
    (gradient,) = torch.autograd.grad(logits.square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"differentiable once; .* backend='reference'"):
        gradient.sum().backward()
