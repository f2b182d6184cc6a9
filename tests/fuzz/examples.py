"""Cases that random runs found, which every run repeats."""

from __future__ import annotations

from dataclasses import replace

import torch

from .cases import Case, LossCase

_case = Case(
    classifier="translation", B=1, K=1, d=1, m=0, dtypes=(torch.float32,) * 3, layouts=("contiguous",) * 3,
    scales=(1.0,) * 3, tau=1.0, tau_form="scalar", specials=("zero input",), frozen=(False,) * 3, seed=0,
)  # fmt: skip
_loss = LossCase(
    bias="none", weight=False, margin="none", margin_kind="logit", margin_size=0.0, reduction="mean", ignored=0.0,
    ignore_index=-100, label_smoothing=0.0, target_dtype=torch.int64, seed=0,
)  # fmt: skip

LOGITS: list[tuple[Case]] = [
    # The terms of a center's gradient and of its norm's cancel, and so do those of the rows.
    (replace(_case, classifier="subcenters", B=16, K=16, m=4, dtypes=(torch.float16,) * 3, specials=()),),
]
LOSSES: list[tuple[Case, LossCase]] = [
    # The gradient of a zero input, of the size 1e12, is infinite in float16.
    (replace(_case, classifier="rotation", dtypes=(torch.float16,) * 3), _loss),
    # A right angle is rounded before its cosine is taken.
    (_case, replace(_loss, margin="number", margin_kind="angle")),
    # The weights of a product are rounded to bfloat16, and its terms and those of the norm cancel.
    (replace(_case, d=2, dtypes=(torch.bfloat16,) * 3, tau_form="number", specials=()), _loss),
]
