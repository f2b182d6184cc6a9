"""gistops: fused kernels for GistNet's constellation classifier.

`constellation_logits` is the operator, `constellation_cross_entropy` its loss and `constellation_topk` its best classes
without logits [B, K], `subcenter_*` the same for free centres. `gistops.nn` has heads for models, `gistops.sampling` the class-balanced
sampler that trains them; `python -m gistops.info` says which backends serve this machine.
"""

from . import nn, sampling
from .backends import BackendUnavailable
from .functional import (
    constellation_cross_entropy,
    constellation_logits,
    constellation_topk,
    subcenter_cross_entropy,
    subcenter_logits,
    subcenter_topk,
)

__version__ = "0.1.0"
__all__ = [
    "BackendUnavailable",
    "__version__",
    "constellation_cross_entropy",
    "constellation_logits",
    "constellation_topk",
    "nn",
    "sampling",
    "subcenter_cross_entropy",
    "subcenter_logits",
    "subcenter_topk",
]
