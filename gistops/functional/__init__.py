"""The public functions: they check the arguments, choose a backend and call its ops."""

from .cross_entropy import constellation_cross_entropy, subcenter_cross_entropy
from .logits import constellation_logits, subcenter_logits
from .topk import constellation_topk, subcenter_topk

__all__ = [
    "constellation_cross_entropy",
    "constellation_logits",
    "constellation_topk",
    "subcenter_cross_entropy",
    "subcenter_logits",
    "subcenter_topk",
]
