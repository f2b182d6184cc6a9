"""Plain PyTorch functions that gistops is compared with.

Each of the logits functions takes input, centers, displacements and tau.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gistops.backends import reference


def linear(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor) -> Tensor:
    """Compute the logits of a linear classifier: the baseline of all ratios."""
    return F.linear(x, w)


def direct(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor) -> Tensor:
    """Compute the constellation logits by definition, with all vectors w_k + δ_j materialized."""
    return tau * reference.best_cosine(F.normalize(x), w, F.pad(delta, (0, 0, 1, 0)))[0]


def split(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor) -> Tensor:
    """Compute the constellation logits by the algebra of the fused kernels.

    It needs one large matmul, and a [B, K, m + 1] tensor unless it is compiled.
    """
    unit = F.normalize(x)
    slots = F.pad(delta, (0, 0, 1, 0))
    squares = w.square().sum(1, keepdim=True) + 2 * w @ slots.T + slots.square().sum(1)
    reciprocal_norms = squares.clamp(min=1e-24).rsqrt()
    scores = (F.linear(unit, w)[:, :, None] + (unit @ slots.T)[:, None, :]) * reciprocal_norms
    return tau * scores.amax(dim=2)


LOGITS: dict[str, Callable[..., Tensor]] = {"linear": linear, "direct": direct, "split": split}


def torch_linear_cross_entropy(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """Compute PyTorch's chunked loss of a linear classifier."""
    # Without options torch computes F.linear and F.cross_entropy, one after the other.
    return F.linear_cross_entropy(x, w, labels, options=torch.nn.LinearCrossEntropyOptions())


def why_no_torch_linear_cross_entropy() -> str | None:
    """Return None if this torch has F.linear_cross_entropy, otherwise the reason why not."""
    if hasattr(F, "linear_cross_entropy"):
        return None
    return f"torch {torch.__version__} does not have F.linear_cross_entropy (added in 2.13)"
