"""gistops: fused kernels for GistNet's constellation classifier."""

from .backends import BackendUnavailable
from .functional import constellation_logits

__version__ = "0.1.0"
__all__ = ["BackendUnavailable", "__version__", "constellation_logits"]
