"""Transfer of the many-shot classes' variation to the features of the balanced stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .precision import wide


class FeatureTransfer(nn.Module):
    """Replace each feature f of the balanced stream by f / ‖f‖ + length · u_j, with a random direction u_j.

    Samples of few-shot classes then vary as those of many-shot classes do. Not in the paper.

    Args:
        num_directions: the number n of directions.
        in_features: the dimension d of the features.
        length: the distance by which a unit feature moves.
    """

    directions: Tensor  # unit vectors, [n, d]; zeros until the method sets them

    def __init__(self, num_directions: int, in_features: int, length: float) -> None:
        super().__init__()
        self.length = length
        self.register_buffer("directions", torch.zeros(num_directions, in_features))

    def forward(self, features: Tensor, num_balanced: int, uniforms: Tensor) -> Tensor:
        """Return the features [b, d] in float32 (float64 for float64), those of the random stream unchanged.

        Args:
            features: the features of both streams, [b, d], the balanced stream first.
            num_balanced: the number of features of the balanced stream.
            uniforms: random numbers in [0, 1) that select the directions, [b].
        """
        selected = self.directions[(uniforms[:num_balanced] * len(self.directions)).long()]
        balanced, random = wide(features).tensor_split([num_balanced])
        return torch.cat([F.normalize(balanced, dim=1) + self.length * selected, random])
