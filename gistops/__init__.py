"""gistops: fused kernels for GistNet's constellation classifier.

`constellation_logits` computes the logits. `constellation_cross_entropy` and `constellation_topk` compute the loss and the
top-k classes without materializing them. `subcenter_*` are the same functions for sub-centers. `gistops.nn` has classifier
heads, `gistops.sampling` the class-balanced sampler, `gistops.export` a table that decomposes the ops into plain PyTorch.
`python -m gistops.info` lists the available backends.
"""

from . import export, nn, sampling
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
    "export",
    "nn",
    "sampling",
    "subcenter_cross_entropy",
    "subcenter_logits",
    "subcenter_topk",
]
