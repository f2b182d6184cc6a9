"""Implementations of the logits, and the two passes of them that are measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gistops

from .. import baselines
from ..problem import Size, Tensors, make_labels

#: The default of `--sizes`.
SIZES = (Size(128, 1000, 512), Size(128, 8142, 2048), Size(256, 8142, 2048), Size(256, 100_000, 512))
NAMES = ("linear", "ours", "split compiled", "split", "direct compiled", "direct")


def ours(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor) -> Tensor:
    """Compute the constellation logits by the CPU backend."""
    return gistops.constellation_logits(x, w, delta, tau, backend="cpu")


def rotation(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor) -> Tensor:
    """Compute the logits of displacements that rotate the centers."""
    axis = torch.linspace(-1, 1, w.shape[1])
    return gistops.constellation_logits(x, w, delta, tau, transform="rotation", axis=axis, backend="cpu")


def subcenters(x: Tensor, centers: Tensor, delta: Tensor, tau: Tensor) -> Tensor:
    """Compute the logits of classes with several centers each, [K, M, d]."""
    return gistops.subcenter_logits(x, centers, tau, backend="cpu")


def implementation(name: str) -> Callable[..., Tensor]:
    """Return the implementation of a name in NAMES. The suffix "compiled" means torch.compile with static shapes."""
    function = (baselines.LOGITS | {"ours": ours})[name.removesuffix(" compiled")]
    if name.endswith(" compiled"):
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, dynamic=False)
    return function


def forward(function: Callable[..., Any], arguments: Tensors) -> Callable[[], None]:
    """Return a call of `function` without gradients."""

    def run() -> None:
        with torch.no_grad():
            function(*arguments)

    return run


def step(function: Callable[..., Tensor], arguments: Tensors) -> Callable[[], None]:
    """Return a call of the logits, F.cross_entropy and the backward. Each call allocates the gradients anew."""
    labels = make_labels(arguments)

    def run() -> None:
        for argument in arguments:
            argument.grad = None
        F.cross_entropy(function(*arguments).float(), labels).backward()

    return run


PASSES = {"forward": forward, "step": step}
