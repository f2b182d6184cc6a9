"""From samples to losses: what is differentiated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..config import Config
from ..methods import Method
from ..methods.residual_directions import TRANSFER, displaced
from ..model.model import Model


class CompiledFeatures:
    """A model's features by torch.compile, for batches of the usual sizes: others are too rare to be compiled for.

    Heads and losses, whose kernels nothing can be fused with, are left out, so that what is compiled stays the same in all
    stages, methods and seeds: it is compiled once, and other processes find it in torch's cache.
    """

    def __init__(self, model: Model, sizes: list[tuple[int, int]]) -> None:
        self._eager, self._compiled = model.features, torch.compile(model.features, dynamic=False)
        self._usual = {size for balanced, random in sizes for size in (balanced, random, balanced + random)}

    def __call__(self, x: Tensor) -> Tensor:
        features: Tensor = (self._compiled if len(x) in self._usual else self._eager)(x)
        return features


class Losses(nn.Module):
    """From samples to losses: what DistributedDataParallel wraps."""

    def __init__(
        self, model: Model, method: Method, config: Config, features: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.model, self.method, self.features = model, method, features
        self.split, self.transfer_length = (
            config.model.batch_norm == "split",
            config.displacements.transfer_length,
        )

    def forward(
        self, x: Tensor, y: Tensor, num_balanced: int, transfer_uniforms: Tensor
    ) -> dict[str, Tensor]:
        if self.split and 0 < num_balanced < len(x):
            streams = x.tensor_split([num_balanced])
            features = torch.cat([self.features(stream) for stream in streams])
        else:
            features = self.features(x)
        if (directions := getattr(self.model.head, TRANSFER, None)) is not None:
            features = displaced(features, directions, self.transfer_length, num_balanced, transfer_uniforms)
        return self.method.losses(self.model.head, features, y, num_balanced)
