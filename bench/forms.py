"""The ways to compute a classifier's logits that are compared: the limit, ours, and what plain PyTorch offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gistops
from gistops.backends import reference


@dataclass(frozen=True)
class Size:
    """B features of length d against K classes, with m displacements."""

    B: int
    K: int
    d: int
    m: int = 4

    @classmethod
    def parse(cls, text: str) -> Size:
        """`256x8142x2048`, or with m at the end: `256x8142x2048x4`."""
        try:
            return cls(*(int(part) for part in text.split("x")))
        except (TypeError, ValueError):
            raise ValueError(
                f"--sizes: expected BxKxd or BxKxdxm, such as 256x8142x2048, got {text!r}"
            ) from None

    def __str__(self) -> str:
        return f"{self.B}×{self.K}×{self.d}" + ("" if self.m == 4 else f", m={self.m}")


SIZES = (Size(128, 1000, 512), Size(128, 8142, 2048), Size(256, 8142, 2048), Size(256, 100_000, 512))
MAIN = SIZES[2]  # iNaturalist 2018's classes, ResNet-50's features
Tensors = tuple[Tensor, Tensor, Tensor, Tensor]


def tensors(size: Size, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensors:
    """input, centers, displacements (a third of the centres' length) and tau, all requiring gradients."""
    scale = size.d**-0.5
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, factor: float) -> Tensor:
        values = torch.randn(rows, size.d, generator=generator, device=device).mul_(factor)
        return values.to(dtype).requires_grad_()

    x, w, delta = normal(size.B, 1.0), normal(size.K, scale), normal(size.m, scale / 3)
    return x, w, delta, torch.tensor(16.0, device=device, requires_grad=True)


def linear(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor) -> Tensor:
    """The limit: a plain linear classifier, one vector a class and no cosine."""
    return F.linear(x, w)


def ours(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor) -> Tensor:
    return gistops.constellation_logits(x, w, delta, tau, backend="cpu")


def direct(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor) -> Tensor:
    """Every vector written out, as the definition has it."""
    return tau * reference.best_cosine(F.normalize(x), w, F.pad(delta, (0, 0, 1, 0)))[0]


def split(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor) -> Tensor:
    """The algebra of the fused form in plain PyTorch: one product, then a [B, K, M] tensor unless it is compiled."""
    unit = F.normalize(x)
    structure = F.pad(delta, (0, 0, 1, 0))
    squares = w.square().sum(1, keepdim=True) + 2 * w @ structure.T + structure.square().sum(1)
    rnorms = squares.clamp(min=1e-24).rsqrt()
    scores = (F.linear(unit, w)[:, :, None] + (unit @ structure.T)[:, None, :]) * rnorms
    return tau * scores.amax(dim=2)


PLAIN: dict[str, Callable[..., Tensor]] = {"linear": linear, "ours": ours, "direct": direct, "split": split}
NAMES = ("linear", "ours", "split compiled", "split", "direct compiled", "direct")


def form(name: str) -> Callable[..., Tensor]:
    """The form by its name; "split compiled" is torch.compile of "split", for the exact sizes it meets."""
    function = PLAIN[name.removesuffix(" compiled")]
    if name.endswith(" compiled"):
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, dynamic=False)
    return function


def forward(function: Callable[..., Tensor], arguments: Tensors) -> Callable[[], Any]:
    def run() -> None:
        with torch.no_grad():
            function(*arguments)

    return run


def labels_of(arguments: Tensors) -> Tensor:
    """A label for each feature: classes in turn."""
    batch, classes = arguments[0].shape[0], arguments[1].shape[0]
    return torch.arange(batch, device=arguments[0].device) % classes


def step(function: Callable[..., Tensor], arguments: Tensors) -> Callable[[], Any]:
    """Forward, cross-entropy and backward, as in training; gradients are made anew each time."""
    labels = labels_of(arguments)

    def run() -> None:
        for argument in arguments:
            argument.grad = None
        F.cross_entropy(function(*arguments).float(), labels).backward()

    return run


PASSES = {"forward": forward, "step": step}
