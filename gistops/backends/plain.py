"""The forward ops in plain PyTorch, for ONNX and other formats that do not have the ops of gistops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..operators.logits import FrozenLogits, Logits, LogitsForward, RotationForward, SubcenterForward
from ..operators.registry import compute_dtype
from ..operators.topk import Best, Topk
from .rotation_coeffs import class_coeffs


def logits_forward(*arguments: Any) -> Logits:
    """Return the split form of csrc/README.md, one slot after the other, with the norms of the vectors themselves."""
    a = LogitsForward(*arguments)
    dtype = compute_dtype(a.input, a.centers, a.displacements)
    f, w, delta = a.input.to(dtype), a.centers.to(dtype), a.displacements.to(dtype)
    product = f @ w.T

    def slots() -> Iterator[tuple[Tensor, Tensor]]:
        yield product, w
        for j in range(delta.shape[0]):
            yield product + f @ delta[j][:, None], w + delta[j]

    return _asked(a, _best_slot(slots(), f, a.tau.to(dtype)))


def subcenter_forward(*arguments: Any) -> Logits:
    a = SubcenterForward(*arguments)
    dtype = compute_dtype(a.input, a.centers)
    f, w = a.input.to(dtype), a.centers.to(dtype)
    slots = ((f @ w[:, j].T, w[:, j]) for j in range(w.shape[1]))
    return _asked(a, _best_slot(slots, f, a.tau.to(dtype)))


def frozen_logits(*arguments: Any) -> tuple[Tensor, Tensor]:
    a = FrozenLogits(*arguments)
    options = (False, a.need_slots, a.logits_dtype)
    if a.centers.dim() == 3:
        return subcenter_forward(a.input, a.centers, a.tau, *options)[:2]
    return logits_forward(a.input, a.centers, a.displacements, a.tau, *options)[:2]


def rotation_forward(*arguments: Any) -> Logits:
    a = RotationForward(*arguments)
    dtype = compute_dtype(a.input, a.centers)
    f, w, directions, turns = (t.to(dtype) for t in (a.input, a.centers, a.directions, a.turns))
    x, y = f @ directions.T, class_coeffs(directions, turns, w)
    rnorm, center_rnorm = _rnorm(f), _rnorm(w)
    product = f @ w.T
    best, slot = product, torch.zeros_like(product, dtype=torch.int32)
    for j in range(1, x.shape[1]):
        score = product + x[:, :1] * y[0, j - 1] + x[:, j : j + 1] * y[1, j - 1]
        best, slot = _running_max(score, j, best, slot)
    logits = best * (a.tau.to(dtype) * rnorm[:, None] * center_rnorm)
    return _asked(a, Logits(logits, slot.to(torch.uint8), center_rnorm.expand(x.shape[1], -1), rnorm))


def topk(*arguments: Any) -> Best:
    a = Topk(*arguments)
    if a.centers.dim() == 3:
        scores, slots = subcenter_forward(a.input, a.centers, a.tau)[:2]
    elif a.directions is not None:
        scores, slots = rotation_forward(a.input, a.centers, a.tau, a.directions, a.turns)[:2]
    else:
        scores, slots = logits_forward(a.input, a.centers, a.displacements, a.tau)[:2]
    if a.class_bias is not None:
        scores = scores + a.class_bias.to(scores.dtype)
    values, classes = scores.topk(a.k, dim=1)
    lse = scores.logsumexp(1) if a.need_lse else scores.new_empty(0)
    return Best(values, classes, slots.gather(1, classes), lse)


def _asked(a: LogitsForward | SubcenterForward | RotationForward, output: Logits) -> Logits:
    """Return the output with the logits in the dtype that was asked for, and without slots that were not."""
    slots = output.slots if a.need_slots else output.slots.new_empty(0)
    return output._replace(logits=output.logits.to(a.logits_dtype or output.logits.dtype), slots=slots)


def _best_slot(slots: Iterable[tuple[Tensor, Tensor]], f: Tensor, tau: Tensor) -> Logits:
    """Return the outputs of a forward op from the products and vectors of each slot."""
    rnorm, rnorms = _rnorm(f), []
    best = slot = f
    for j, (product, vectors) in enumerate(slots):
        rnorms.append(_rnorm(vectors))
        score = product * rnorms[-1]
        if j == 0:
            best, slot = score, torch.zeros_like(score, dtype=torch.int32)
        else:
            best, slot = _running_max(score, j, best, slot)
    return Logits(best * (tau * rnorm[:, None]), slot.to(torch.uint8), torch.stack(rnorms), rnorm)


def _rnorm(vectors: Tensor) -> Tensor:
    norm = vectors.square().sum(1).sqrt()
    return torch.where(norm == torch.inf, torch.nan, norm).clamp(min=1e-12).reciprocal()


def _running_max(score: Tensor, j: int, best: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """Include one more slot in the maximum. Unlike the ops, NaN does not win: ONNX runtimes differ there."""
    wins = score > best
    return torch.where(wins, score, best), torch.where(wins, j, slot)


class _Packet(NamedTuple):
    default: Callable[..., Any]


class PlainOps:
    """A namespace like `torch.ops.gistops`, with the forward ops alone."""

    logits_forward = _Packet(logits_forward)
    subcenter_forward = _Packet(subcenter_forward)
    rotation_forward = _Packet(rotation_forward)
    frozen_logits = _Packet(frozen_logits)
    topk = _Packet(topk)
