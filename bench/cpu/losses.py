"""Implementations of the loss and of top-k, with materialized logits and without."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gistops

from .. import baselines
from ..problem import Tensors, make_labels
from . import logits

Run = Callable[[], Any]
TOP_K = 10


def linear_loss(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor, labels: Tensor) -> Tensor:
    """Compute the loss of a plain linear softmax classifier: the baseline of all ratios."""
    return F.cross_entropy(F.linear(x, w), labels)


def torch_loss(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor, labels: Tensor) -> Tensor:
    """Compute the loss of the same classifier by PyTorch's chunked function."""
    return baselines.torch_linear_cross_entropy(x, w, labels)


def loss_of_logits(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor, labels: Tensor) -> Tensor:
    """Compute the loss from materialized logits."""
    return F.cross_entropy(logits.ours(x, w, delta, tau), labels)


def ours(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Compute the fused loss by the CPU backend."""
    loss = gistops.constellation_cross_entropy(x, w, delta, tau, labels, backend="cpu", **options)
    assert isinstance(loss, Tensor)
    return loss


def without_displacements(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor, labels: Tensor) -> Tensor:
    """Compute the fused loss of a cosine classifier."""
    return ours(x, w, delta[:0], tau, labels)


def smoothed(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor, labels: Tensor) -> Tensor:
    """Compute the balanced softmax loss with label smoothing, per sample."""
    bias = torch.linspace(-3, 3, w.shape[0])
    return ours(x, w, delta, tau, labels, class_bias=bias, label_smoothing=0.1, reduction="none").sum()


def rotation(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor, labels: Tensor) -> Tensor:
    """Compute the fused loss with displacements that rotate the centers."""
    axis = torch.linspace(-1, 1, w.shape[1], requires_grad=True)
    return ours(x, w, delta, tau, labels, transform="rotation", axis=axis)


def subcenters(x: Tensor, centers: Tensor, delta: Tensor, tau: Tensor, labels: Tensor) -> Tensor:
    """Compute the fused loss of classes with several centers each, [K, M, d]."""
    loss = gistops.subcenter_cross_entropy(x, centers, tau, labels, backend="cpu")
    assert isinstance(loss, Tensor)
    return loss


LOSSES: dict[str, Callable[..., Tensor]] = {
    "linear": linear_loss,
    "ours": ours,
    "ours, m=0": without_displacements,
    "ours, bias and smoothing": smoothed,
    "ours, rotation": rotation,
    "our logits, then F.cross_entropy": loss_of_logits,
    "F.linear_cross_entropy": torch_loss,
}


def why_not(name: str) -> str | None:
    """Return the reason why a loss cannot be measured here, or None."""
    return baselines.why_no_torch_linear_cross_entropy() if name == "F.linear_cross_entropy" else None


def loss_step(function: Callable[..., Tensor], arguments: Tensors) -> Run:
    """Return a call of a loss and its backward to all arguments. Each call allocates the gradients anew."""
    labels = make_labels(arguments)

    def run() -> None:
        for argument in arguments:
            argument.grad = None
        function(*arguments, labels).backward()

    return run


def linear_topk(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor, k: int) -> tuple[Tensor, ...]:
    """Compute the top classes of a plain linear classifier."""
    return tuple(F.linear(x, w).topk(k, dim=1))


def topk_of_logits(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor, k: int) -> tuple[Tensor, ...]:
    """Compute the top classes from materialized logits."""
    return tuple(logits.ours(x, w, delta, tau).topk(k, dim=1))


def our_topk(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor, k: int) -> tuple[Tensor, ...]:
    """Compute the top classes by the CPU backend."""
    return gistops.constellation_topk(x, w, delta, tau, k, backend="cpu")


def our_probabilities(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor, k: int) -> Tensor:
    """Compute the probabilities of the top classes, normalized over all classes."""
    values, _, _, lse = gistops.constellation_topk(x, w, delta, tau, k, return_lse=True, backend="cpu")
    return (values - lse[:, None]).exp()


TOPK: dict[str, Callable[..., Any]] = {
    "linear": linear_topk,
    "ours": our_topk,
    "ours, with probabilities": our_probabilities,
    "our logits, then topk": topk_of_logits,
}


def topk(name: str, arguments: Tensors, k: int = TOP_K) -> Run:
    """Return a call of a top-k implementation, for all classes if there are fewer than k."""
    return logits.forward(functools.partial(TOPK[name], k=min(k, len(arguments[1]))), arguments)
