"""gistops: fused kernels for GistNet's constellation classifier.

`constellation_logits` is the operator, `gistops.nn` has heads for models, `gistops.sampling` the class-balanced
sampler that trains them; `python -m gistops.info` says which backends serve this machine.
"""

from . import nn, sampling
from .backends import BackendUnavailable
from .functional import constellation_logits

__version__ = "0.1.0"
__all__ = ["BackendUnavailable", "__version__", "constellation_logits", "nn", "sampling"]
