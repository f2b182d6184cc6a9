"""A head with sub-centers: each class has vectors of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import MAX_SLOTS
from .._classifier import Classifier, no_displacements
from .._numbers import check_integer
from ..functional import subcenter_cross_entropy, subcenter_logits
from .head import MaxCosineHead


class SubcenterClassifier(MaxCosineHead):
    """A classifier whose classes have sub-centers of their own: logits `τ · max_j cos(f, w_kj)`.

    Sub-center ArcFace (Deng, Guo, Liu, Gong, Zafeiriou, ECCV 2020) uses 3 sub-centers per class, τ = 64 and an angular
    margin: `loss(x, y, margin=0.5, margin_kind="angle")`.

    Parameters of the module:
        centers: w, [num_classes, num_subcenters, in_features]; entries N(0, 1/in_features).
        raw_tau: [1]; τ = softplus(raw_tau). Exclude it from weight decay.

    Args:
        in_features: dimension d of the features.
        num_classes: number of classes K.
        num_subcenters: number of sub-centers per class M, 1 to 256.
        tau: initial temperature, above 0.
        device, dtype: device and dtype of the parameters, as in `torch.nn.Linear`.
        backend: as in `gistops.constellation_logits`.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; the message names it.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_subcenters: int = 3,
        *,
        tau: float = 16.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, tau, backend)
        self.num_subcenters = check_integer("num_subcenters", num_subcenters, 1, MAX_SLOTS)
        shapes = {"centers": (num_classes, num_subcenters, in_features), "raw_tau": (1,)}
        self._make_parameters(shapes, device, dtype)
        self.reset_parameters()

    def forward(
        self, input: Tensor, return_slots: bool = False, *, logits_dtype: torch.dtype | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the logits [..., num_classes]; with `return_slots` also the winning sub-centers, uint8.

        Args and errors: as for `gistops.subcenter_logits`.
        """
        return subcenter_logits(
            input,
            self.centers,
            self.tau,
            return_slots=return_slots,
            logits_dtype=logits_dtype,
            backend=self.backend,
        )

    def loss(self, input: Tensor, target: Tensor, **options: Any) -> Tensor:
        return subcenter_cross_entropy(  # type: ignore[return-value]
            input, self.centers, self.tau, target, backend=self.backend, **options
        )

    loss.__doc__ = MaxCosineHead.loss.__doc__

    def _classifier(self) -> Classifier:
        return Classifier(self.centers, no_displacements(self.centers), self.tau, "subcenters")

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, num_classes={self.num_classes}"
        text += f", num_subcenters={self.num_subcenters}"
        return text if self.backend is None else f"{text}, backend={self.backend!r}"
