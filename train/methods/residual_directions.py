"""The structure that classes share: how many-shot classes spread around their means, and what is done with it.

Displacements may start along those directions, or follow them as the features change; and the balanced stream's features may
be displaced by them, so that the few samples of a small class vary as those of large ones do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gistops.nn import ConstellationClassifier

from .. import distributed
from ..config import Config

Sample = Callable[[], tuple[Tensor, Tensor]]  # training features [n, d] and their classes [n]

#: Most samples that the clustering looks at; more bring no other directions.
MOST = 20_000


#: The buffer of a head that holds the directions by which the balanced stream's features are displaced, [n, d].
TRANSFER = "transfer_directions"


def begin(
    head: ConstellationClassifier, config: Config, counts: Tensor, sample: Sample, transfer: bool = False
) -> None:
    """Give a head the second stage's displacements; with `transfer` also directions to displace features by.

    Args:
        head: without displacements.
        config: how they start, and how many of each.
        counts: training samples of each class, [K].
        sample: gives the training features.
        transfer: whether the method displaces its balanced stream.
    """
    head.add_displacements(config.method.num_displacements, scale=config.displacements.displacement_scale)
    if follows_residuals(head, config):
        head.displacements.requires_grad_(False)
    if transfer and config.displacements.transfer_directions:
        directions = head.centers.new_zeros(config.displacements.transfer_directions, head.in_features)
        head.register_buffer(TRANSFER, directions)
    _fit(head, config, counts, sample, start=True)


def follow(head: ConstellationClassifier, config: Config, counts: Tensor, sample: Sample) -> None:
    """Turn what follows the residuals to where those of today's features point."""
    _fit(head, config, counts, sample, start=False)


def follows_residuals(head: ConstellationClassifier, config: Config) -> bool:
    """Whether a head's displacements are found, not trained. Rotations and MLPs are always trained."""
    return config.displacements.displacement_update == "residuals" and head.transform == "translation"


@torch.no_grad()
def _fit(head: ConstellationClassifier, config: Config, counts: Tensor, sample: Sample, start: bool) -> None:
    fitted: list[tuple[Tensor, Tensor | float]] = []  # where, and how long
    found = (
        start and config.displacements.displacement_init == "residuals" and head.transform == "translation"
    )
    if found or follows_residuals(head, config):
        scale = config.displacements.displacement_scale or head.displacement_scale
        length = scale * head.centers.norm(dim=1).mean()
        fitted.append((head.displacements, length))
    if (directions := getattr(head, TRANSFER, None)) is not None:
        fitted.append((directions, 1.0))
    if not fitted:
        return
    features, labels = sample()
    for where, length in fitted:
        # In one process, as GPUs may differ in the last bit, and clusters then in all.
        new = distributed.broadcast_from_rank0(
            lambda where=where: residual_directions(  # type: ignore[misc]
                features, labels, counts, len(where), config.run.seed, None if start else where
            ).cpu()
        )
        where.copy_(length * new.to(where))


def displaced(
    features: Tensor, directions: Tensor, length: float, num_balanced: int, uniforms: Tensor
) -> Tensor:
    """Features [b, d] of which the first, the balanced stream's, are of unit length and moved by one of the directions.

    Args:
        features: of both streams.
        directions: unit vectors, [n, d].
        length: of the move.
        num_balanced: how many are the balanced stream's.
        uniforms: random numbers in [0, 1) that select the directions, [b].
    """
    chosen = directions[(uniforms[:num_balanced] * len(directions)).long()]
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    balanced, random = wide.tensor_split([num_balanced])
    return torch.cat([F.normalize(balanced, dim=1) + length * chosen, random])


def residual_directions(
    features: Tensor, labels: Tensor, counts: Tensor, num: int, seed: int, start: Tensor | None = None
) -> Tensor:
    """Unit vectors [num, d]: centres of the clusters of what is left of features without their class's mean.

    In the space of unit features, which is the heads'. Of the classes with more than the mean number of samples, whose
    means are the surest; residuals count by their direction alone.

    Args:
        features: of training samples, [n, d].
        labels: their classes, [n].
        counts: training samples of each class, [K].
        num: number of directions, at least 1.
        seed: of the clustering.
        start: directions [num, d] to start the clustering from, such as those of an epoch ago, whose order stays.

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
            f"--num-displacements, --transfer-directions: expected at most {len(residuals)}, the samples of the larger classes, "
            f"whose residuals they are found in; got {num}"
        )
    starts = 4 if start is None else 1
    init = "k-means++" if start is None else start.double().cpu().numpy()
    clusters = KMeans(num, init=init, n_init=starts, random_state=seed).fit(residuals.cpu().numpy())
    centers = F.normalize(torch.from_numpy(clusters.cluster_centers_), dim=1)
    return centers.to(features.device, torch.float32)
