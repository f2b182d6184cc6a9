"""The problem that all benches measure: its sizes, and tensors of a size."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Size:
    """B rows of d dimensions, K classes, and m displacements."""

    B: int
    K: int
    d: int
    m: int = 4

    @classmethod
    def parse(cls, text: str) -> Size:
        """Parse `256x8142x2048`, or with m at the end `256x8142x2048x4`."""
        try:
            return cls(*(int(part) for part in text.split("x")))
        except (TypeError, ValueError):
            raise ValueError(
                f"--sizes: expected BxKxd or BxKxdxm, such as 256x8142x2048, got {text!r}"
            ) from None

    @property
    def text(self) -> str:
        """The text that `parse` reads."""
        return f"{self.B}x{self.K}x{self.d}" + ("" if self.m == 4 else f"x{self.m}")

    def __str__(self) -> str:
        return f"{self.B}×{self.K}×{self.d}" + ("" if self.m == 4 else f", m={self.m}")


#: The size of the stated targets: the classes of iNaturalist 2018, the features of ResNet-50.
MAIN = Size(256, 8142, 2048)
#: A size with B >= d and K > d, where the documentation of torch.nn.LinearCrossEntropyOptions says that chunking pays.
FAIR = Size(2048, 8142, 1024)
Tensors = tuple[Tensor, Tensor, Tensor, Tensor]


def is_large(size: Size) -> bool:
    """Return True if a matrix product of the size takes longer than one of `MAIN`."""
    return size.B * size.K * size.d > MAIN.B * MAIN.K * MAIN.d


def parse_sizes(text: str) -> tuple[Size, ...]:
    """Parse an option such as `256x8142x128,256x65536x128`."""
    try:
        return tuple(Size.parse(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def make_tensors(
    size: Size, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> Tensors:
    """Return input, centers, displacements (a third of the centers' length) and tau, which all require grad."""
    scale = size.d**-0.5
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, factor: float) -> Tensor:
        values = torch.randn(rows, size.d, generator=generator, device=device).mul_(factor)
        return values.to(dtype).requires_grad_()

    x, w, delta = normal(size.B, 1.0), normal(size.K, scale), normal(size.m, scale / 3)
    return x, w, delta, torch.tensor(16.0, device=device, requires_grad=True)


def make_labels(arguments: Tensors) -> Tensor:
    """Return a label per row. The labels cycle through the classes."""
    batch, classes = arguments[0].shape[0], arguments[1].shape[0]
    return torch.arange(batch, device=arguments[0].device) % classes
