"""The prior: the class frequencies of the training samples."""

from __future__ import annotations

from torch import Tensor


def log_prior(counts: Tensor) -> Tensor:
    """Return the logarithm of each class's fraction of the training samples, [K] float32."""
    return (counts / counts.sum()).log().float()
