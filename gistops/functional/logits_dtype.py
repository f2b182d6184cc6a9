"""The dtype in which logits are returned."""

from __future__ import annotations

import torch
from torch import Tensor

from .._classifier import Classifier
from ..operators.registry import has_autocast


def check_logits_dtype(logits_dtype: object, input: Tensor, classifier: Classifier) -> torch.dtype | None:
    """Return the dtype in which the ops shall store the logits; None for the dtype in which they are computed.

    Raises:
        TypeError: `logits_dtype` is not a dtype.
        ValueError: `logits_dtype` is neither the dtype of computation nor that of input, as autocast changes it.
    """
    if logits_dtype is None:
        return None
    if not isinstance(logits_dtype, torch.dtype):
        raise TypeError(f"logits_dtype: expected None or a torch.dtype, got {type(logits_dtype).__name__}")
    wide, narrow, device = classifier.compute_dtype(input), input.dtype, input.device.type
    if narrow != torch.float64 and has_autocast(device) and torch.is_autocast_enabled(device):
        narrow = torch.get_autocast_dtype(device)
    if logits_dtype not in (wide, narrow):
        dtypes = f"{wide}" if narrow == wide else f"{wide} or, as input, {narrow}"
        raise ValueError(f"logits_dtype: expected None, {dtypes}, got {logits_dtype}")
    return None if logits_dtype == wide else logits_dtype
