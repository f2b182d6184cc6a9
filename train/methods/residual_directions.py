"""The directions in which the samples of many-shot classes spread around their class means."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .class_means import class_means

#: The largest number of samples that are clustered; more samples do not change the directions.
MAX_SAMPLES = 20_000


def many_shot(counts: Tensor) -> Tensor:
    """Return a mask over the classes, [K] bool: those with more than the mean number of samples; all if none has more."""
    many = counts > counts.double().mean()
    return many if many.any() else torch.ones_like(many)


def num_residuals(counts: Tensor) -> int:
    """Return the number of residuals that are clustered: the largest number of directions."""
    samples = int(counts[many_shot(counts)].sum())
    return len(range(0, samples, _stride(samples)))


def _stride(samples: int) -> int:
    return max(1, samples // MAX_SAMPLES)


def residual_directions(
    features: Tensor, labels: Tensor, counts: Tensor, num: int, seed: int, start: Tensor | None = None
) -> Tensor:
    """Cluster the residuals of unit features from their class means; return the cluster centers as unit vectors, [num, d].

    Only classes with more than the mean number of samples count, because their means are the most accurate. Residuals are
    normalized.

    Args:
        features: the features of training samples, [n, d].
        labels: their classes, [n].
        counts: the number of training samples of each class, [K].
        num: the number of directions, at least 1.
        seed: the seed of the clustering.
        start: initial directions, [num, d], such as those of the previous epoch; their order is kept.

    Raises:
        ValueError: there are fewer residuals than directions.
    """
    from sklearn.cluster import KMeans  # here because the import takes a second, too long for --help

    kept = many_shot(counts).to(labels.device)[labels].nonzero().flatten()
    means = class_means(features[kept], labels[kept], len(counts), unit=True)
    sample = kept[:: _stride(len(kept))]
    residuals = F.normalize(F.normalize(features[sample].double(), dim=1) - means[labels[sample]], dim=1)
    if len(residuals) < num:
        raise ValueError(
            f"--num-displacements, --transfer-directions: expected at most {len(residuals)}, the number of samples of the "
            f"classes with more than the mean number; got {num}"
        )
    starts = 4 if start is None else 1
    init = "k-means++" if start is None else start.double().cpu().numpy()
    clusters = KMeans(num, init=init, n_init=starts, random_state=seed).fit(residuals.cpu().numpy())
    centers = F.normalize(torch.from_numpy(clusters.cluster_centers_), dim=1)
    return centers.to(features.device, torch.float32)
