"""Where displacements start: along the directions in which many-shot classes spread around their means."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Most samples that the clustering looks at; more bring no other directions.
MOST = 20_000


def residual_directions(features: Tensor, labels: Tensor, counts: Tensor, num: int, seed: int) -> Tensor:
    """Unit vectors [num, d]: centres of the clusters of what is left of features without their class's mean.

    In the space of unit features, which is the heads'. Of the classes with more than the mean number of samples, whose
    means are the surest; residuals count by their direction alone.

    Args:
        features: of training samples, [n, d].
        labels: their classes, [n].
        counts: training samples of each class, [K].
        num: number of directions, at least 1.
        seed: of the clustering.

    Raises:
        ValueError: there are fewer residuals than directions.
    """
    from sklearn.cluster import KMeans  # takes a second, which --help should not

    many = counts.to(labels.device) > counts.double().mean()
    if not many.any():  # all classes have as many
        many = torch.ones_like(many)
    kept = many[labels].nonzero().flatten()
    label = labels[kept]
    sums = features.new_zeros(len(counts), features.shape[1], dtype=torch.float64)
    for rows in kept.split(MOST):  # in parts, as all samples in float64 may not fit
        sums.index_add_(0, labels[rows], F.normalize(features[rows].double(), dim=1))
    means = sums / torch.bincount(label, minlength=len(counts)).clamp(min=1)[:, None]
    sample = kept[:: max(1, len(kept) // MOST)]
    residuals = F.normalize(F.normalize(features[sample].double(), dim=1) - means[labels[sample]], dim=1)
    if len(residuals) < num:
        raise ValueError(
            f"--num-displacements: expected at most {len(residuals)}, the samples of the larger classes, "
            f"to start them from residuals; got {num}"
        )
    clusters = KMeans(num, n_init=4, random_state=seed).fit(residuals.cpu().numpy())
    centers = F.normalize(torch.from_numpy(clusters.cluster_centers_), dim=1)
    return centers.to(features.device, torch.float32)
