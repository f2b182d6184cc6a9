"""Sizes, heads, batches and the float64 definition, for the tests of the heads."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from gistops.backends import reference
from gistops.nn import ConstellationClassifier, GistClassifier

D, K, M, B = 41, 67, 4, 53
KINDS = [ConstellationClassifier, GistClassifier]

Head = TypeVar("Head", bound=ConstellationClassifier)


def reference_logits(input: Tensor, centers: Tensor, displacements: Tensor, raw_tau: Tensor) -> Tensor:
    """Compute the logits by definition in float64."""
    return reference.constellation_logits(
        input.double(), centers.double(), displacements.double(), raw_tau.double().exp().log1p()
    )[0]


def spread(head: Head) -> Head:
    """Lengthen the displacements and draw distinct temperatures, so that every slot and stream affects the result."""
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name == "displacements":
                parameter.copy_(torch.randn_like(parameter) * 0.8 * D**-0.5)
            elif "tau" in name:
                parameter.copy_(torch.rand_like(parameter) * 12 + 8)
    return head


def batch(classes: int = K, size: int = B) -> tuple[Tensor, Tensor]:
    """Draw features and labels."""
    return torch.randn(size, D, requires_grad=True), torch.randint(classes, (size,))
