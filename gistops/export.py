"""For exporters: the operators as plain PyTorch.

ONNX and other formats know nothing of gistops' operators. Exporting takes two steps:

    program = torch.export.export(head.eval(), (features,), dynamic_shapes=({0: "batch"},))
    program = program.run_decompositions(gistops.export.decompositions())
    torch.onnx.export(program, f="head.onnx")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backends import native
from .operators.registry import compute_dtype


def decompositions() -> dict[Any, Callable[..., Any]]:
    """A table for `ExportedProgram.run_decompositions`: the compiled operators' forwards in terms of PyTorch's own.

    Besides the table of PyTorch's core operators (`torch.export.default_decompositions`), which it contains.

    Raises:
        RuntimeError: the compiled operators are not there.
    """
    status = native.load()
    if not status.loaded:
        raise RuntimeError(f"gistops.export needs the compiled operators: {status.reason}")
    operators = torch.ops.gistops
    table = dict(torch.export.default_decompositions().items())
    table[operators.constellation_forward.default] = _forward
    table[operators.constellation_frozen_forward.default] = _frozen_forward
    table[operators.tabled_forward.default] = _tabled_forward
    return table


def _forward(
    input: Tensor, centers: Tensor, displacements: Tensor, tau: Tensor, allow_tf32: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """csrc/README.md's split form, one slot after the other; norms from the vectors themselves."""
    dtype = compute_dtype(input, centers, displacements)
    f, w, delta = input.to(dtype), centers.to(dtype), displacements.to(dtype)
    rnorm = f.square().sum(1).sqrt().clamp(min=1e-12).reciprocal()
    rnorms = []
    product = None if w.dim() == 3 else f @ w.T
    best = slot = None
    for j in range(delta.shape[0] + 1 if w.dim() == 2 else w.shape[1]):
        if product is None:
            vectors, score = w[:, j], f @ w[:, j].T
        elif j == 0:
            vectors, score = w, product
        else:
            vectors, score = w + delta[j - 1], product + f @ delta[j - 1][:, None]
        rnorms.append(vectors.square().sum(1).sqrt().clamp(min=1e-12).reciprocal())
        score = score * rnorms[-1]
        best, slot = _better(score, j, best, slot)
    assert best is not None
    assert slot is not None
    logits = best * (tau.to(dtype) * rnorm[:, None])
    return logits, slot.to(torch.uint8), torch.stack(rnorms), rnorm


def _better(score: Tensor, j: int, best: Tensor | None, slot: Tensor | None) -> tuple[Tensor, Tensor]:
    if best is None or slot is None:
        return score, torch.zeros_like(score, dtype=torch.int32)
    wins = score > best
    return torch.where(wins, score, best), torch.where(wins, j, slot)


def _frozen_forward(
    input: Tensor, centers: Tensor, displacements: Tensor, tau: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor]:
    logits, slots, _, _ = _forward(input, centers, displacements, tau)
    return logits, slots


def _tabled_forward(
    input: Tensor,
    centers: Tensor,
    tau: Tensor,
    feature_table: Tensor,
    class_tables: Tensor,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(input, centers)
    f, w, x, y = (t.to(dtype) for t in (input, centers, feature_table, class_tables))
    rnorm, center_rnorm = (t.square().sum(1).sqrt().clamp(min=1e-12).reciprocal() for t in (f, w))
    product = f @ w.T
    best, slot = _better(product, 0, None, None)
    for j in range(1, x.shape[1]):
        score = product + x[:, :1] * y[0, j] + x[:, j : j + 1] * y[1, j]
        best, slot = _better(score, j, best, slot)
    logits = best * (tau.to(dtype) * rnorm[:, None] * center_rnorm)
    return logits, slot.to(torch.uint8), center_rnorm.expand(x.shape[1], -1), rnorm
