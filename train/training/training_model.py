"""The differentiable part of a step: samples to losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..data.stream.mixing import MixedLabels
from ..methods.method import Method
from ..model.model import Model


class TrainingModel(nn.Module):
    """The model and the losses of a method, as one module for DistributedDataParallel.

    Args:
        model: the model.
        method: the method.
        features: `model.features`, or its compiled form.
        split_batch_norm: pass the streams through the backbone one after the other, so that each has its own statistics.
        shared_streams: each sample is in both streams.
    """

    def __init__(
        self,
        model: Model,
        method: Method,
        features: Callable[[Tensor], Tensor],
        *,
        split_batch_norm: bool,
        shared_streams: bool,
    ) -> None:
        super().__init__()
        self.model, self.method, self.features = model, method, features
        self.split_batch_norm, self.shared_streams = split_batch_norm, shared_streams

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        num_balanced: int,
        transfer_uniforms: Tensor,
        mixed: MixedLabels | None = None,
    ) -> dict[str, Tensor]:
        """Return the losses of the samples; those of mixed samples are the means over both labels, by their shares."""
        if self.split_batch_norm and 0 < num_balanced < len(x):
            streams = x.tensor_split([num_balanced])
            features = torch.cat([self.features(stream) for stream in streams])
        else:
            features = self.features(x)
        labels = [y] if mixed is None else [y, mixed.labels]
        if self.shared_streams:
            features, num_balanced = features.repeat(2, 1), len(y)
            labels = [label.repeat(2) for label in labels]
        if self.model.feature_transfer is not None:
            features = self.model.feature_transfer(features, num_balanced, transfer_uniforms)
        losses, *others = (
            self.method.training_losses(self.model, x, features, label, num_balanced) for label in labels
        )
        if mixed is None:
            return losses
        return {
            name: torch.lerp(others[0][name], loss, mixed.share.to(loss)) for name, loss in losses.items()
        }


class CompiledFeatures:
    """`model.features` by torch.compile for the usual batch sizes, and not compiled for others, which are too rare.

    Heads and losses are left out: their kernels cannot be fused with others. The compiled function is then the same in all
    stages, methods and seeds, so it is compiled once, and other processes find it in torch's cache.

    Args:
        model: the model.
        sizes: the numbers of balanced and random samples in each micro-batch of the usual size.
    """

    def __init__(self, model: Model, sizes: list[tuple[int, int]]) -> None:
        self._eager, self._compiled = model.features, torch.compile(model.features, dynamic=False)
        self._usual = {size for balanced, random in sizes for size in (balanced, random, balanced + random)}

    def __call__(self, x: Tensor) -> Tensor:
        features: Tensor = (self._compiled if len(x) in self._usual else self._eager)(x)
        return features
