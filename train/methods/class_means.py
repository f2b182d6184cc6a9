"""Class means of features, and centers that start from them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..model.model import Model
from ..model.sharded_head import local, local_classes
from .method import StageData

ROWS = 4096  # samples per chunk, because all samples in float64 may not fit into memory


def class_means(
    features: Tensor, labels: Tensor, num_classes: int, *, origin: Tensor | None = None, unit: bool = False
) -> Tensor:
    """Return the mean feature of each class, [K, d] float64; zeros for a class without samples.

    Args:
        features: the features, [n, d].
        labels: their classes, [n].
        num_classes: K.
        origin: subtracted from the features, [d].
        unit: normalize the features.
    """
    sums = features.new_zeros(num_classes, features.shape[1], dtype=torch.float64)
    for rows, classes in zip(features.split(ROWS), labels.split(ROWS), strict=True):
        wide = rows.double() if origin is None else rows.double() - origin
        sums.index_add_(0, classes, F.normalize(wide, dim=1) if unit else wide)
    return sums / torch.bincount(labels, minlength=num_classes).clamp(min=1)[:, None]


@torch.no_grad()
def start_from_class_means(centers: Iterable[Tensor], model: Model, data: StageData) -> None:
    """Set centers to the unit vectors along the mean unit feature of each class (Qi, Brown, Lowe, CVPR 2018, "imprinting").

    Features are those at the start of training. If the model centers them, the statistics of the centering start from those
    of all training samples.

    Args:
        centers: tensors [K, d].
        model: the model.
        data: returns the features of the training samples.
    """
    features, labels = data.training()
    if isinstance(center := model.center, _BatchNorm):
        assert center.running_mean is not None
        assert center.running_var is not None
        raw = features * (center.running_var + center.eps).sqrt() + center.running_mean
        center.running_mean.copy_(raw.mean(0))
        center.running_var.copy_(raw.var(0, correction=0))
        features = (raw - center.running_mean) * torch.rsqrt(center.running_var + center.eps)
    for tensor in centers:
        own = local_classes(tensor)
        kept = slice(None) if len(own) == len(tensor) else (labels >= own.start) & (labels < own.stop)
        means = class_means(features[kept], labels[kept] - own.start, len(own), unit=True)
        local(tensor).copy_(F.normalize(means, dim=1))
