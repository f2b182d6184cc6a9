"""The ways to a loss, and to the best classes, that are compared: with the logits held, and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gistops

from . import forms
from .forms import Tensors, labels_of

Run = Callable[[], Any]
#: Number of classes asked for.
BEST = 10


def linear_loss(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor, labels: Tensor) -> Tensor:
    """The limit: a plain linear softmax classifier."""
    return F.cross_entropy(F.linear(x, w), labels)


def torch_loss(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor, labels: Tensor) -> Tensor:
    """PyTorch's own loss without logits, of the same linear classifier; 2.13 brought it."""
    # Without options it is the two functions above, one after the other.
    return F.linear_cross_entropy(x, w, labels, options=torch.nn.LinearCrossEntropyOptions())


def held(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(forms.ours(x, w, delta, tau), labels)


def ours(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor, labels: Tensor, **more: Any) -> Tensor:
    loss = gistops.constellation_cross_entropy(x, w, delta, tau, labels, backend="cpu", **more)
    assert isinstance(loss, Tensor)
    return loss


def bare(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor, labels: Tensor) -> Tensor:
    return ours(x, w, delta[:0], tau, labels)


def smoothed(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor, labels: Tensor) -> Tensor:
    """Balanced softmax with label smoothing, one loss for each sample."""
    bias = torch.linspace(-3, 3, w.shape[0])
    return ours(x, w, delta, tau, labels, class_bias=bias, label_smoothing=0.1, reduction="none").sum()


def rotation(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor, labels: Tensor) -> Tensor:
    axis = torch.linspace(-1, 1, w.shape[1], requires_grad=True)
    return ours(x, w, delta, tau, labels, transform="rotation", axis=axis)


#: Those that can be had of a size's tensors, against `linear_loss`.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "linear": linear_loss,
    "ours": ours,
    "ours, m=0": bare,
    "ours, bias and smoothing": smoothed,
    "ours, rotation": rotation,
    "our logits, then F.cross_entropy": held,
    "F.linear_cross_entropy": torch_loss,
}


def why_not(name: str) -> str | None:
    """Why a form cannot be measured here, or None."""
    if name == "F.linear_cross_entropy" and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has none; 2.13 brought it"
    return None


def loss_step(name: str, arguments: Tensors) -> Run:
    """Loss and backward to all arguments; gradients are made anew each time."""
    labels, function = labels_of(arguments), LOSSES[name]

    def run() -> None:
        for argument in arguments:
            argument.grad = None
        function(*arguments, labels).backward()

    return run


def free_step(arguments: Tensors, vectors: int) -> Run:
    """A step of `subcenter_cross_entropy`, M centres a class."""
    x, w, _, tau = arguments
    centers = torch.randn(w.shape[0], vectors, w.shape[1], requires_grad=True)
    labels = labels_of(arguments)

    def run() -> None:
        for argument in (x, centers, tau):
            argument.grad = None
        gistops.subcenter_cross_entropy(x, centers, tau, labels, backend="cpu").backward()  # type: ignore[union-attr]

    return run


def linear_topk(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor) -> tuple[Tensor, ...]:
    return tuple(F.linear(x, w).topk(BEST, dim=1))


def held_topk(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor) -> tuple[Tensor, ...]:
    return tuple(forms.ours(x, w, delta, tau).topk(BEST, dim=1))


def our_topk(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor) -> tuple[Tensor, ...]:
    return gistops.constellation_topk(x, w, delta, tau, BEST, backend="cpu")


def our_probabilities(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor) -> Tensor:
    """Of the best classes, over all."""
    values, _, _, lse = gistops.constellation_topk(x, w, delta, tau, BEST, return_lse=True, backend="cpu")
    return (values - lse[:, None]).exp()


TOPK: dict[str, Callable[..., Any]] = {
    "linear": linear_topk,
    "ours": our_topk,
    "ours, with probabilities": our_probabilities,
    "our logits, then topk": held_topk,
}


def topk(name: str, arguments: Tensors) -> Run:
    return forms.forward(TOPK[name], arguments)
