"""The head of OLTR: a memory of class centroids that enriches features, and a cosine classifier that reads their norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import gistops

REACH = 10.0  # a feature at this distance from the nearest centroid keeps its scale
SCALE = 16.0  # of the cosines
MIN_DISTANCE = 1e-6  # a class with a single sample may have its feature as its centroid


class MemoryHead(nn.Module):
    """The dynamic meta-embedding and the cosine classifier of OLTR (Liu et al., CVPR 2019).

        v  = softmax(H f + a) C                   the memory's answer to f
        e  = tanh(T f + b)                        the concept selector
        f' = (10 / min_k ‖f − c_k‖) (f + e ⊙ v)   scaled by the reachability
        s_k = 16 · ‖f'‖ / (1 + ‖f'‖) · cos(f', w_k)

    The centroids C are constants here, as in the authors' code: only a loss of their own trains them.

    Parameters of the module:
        centroids: C, [num_classes, in_features].
        hallucinator: H and a, from the feature to a weight per centroid.
        selector: T and b, from the feature to a factor per dimension.
        weight: w, [num_classes, in_features].

    Args:
        in_features: the dimension d of the features.
        num_classes: the number of classes K.
        backend: as in `gistops.constellation_logits`.
    """

    def __init__(self, in_features: int, num_classes: int, backend: str | None = None) -> None:
        super().__init__()
        self.backend = backend
        self.centroids = nn.Parameter(torch.zeros(num_classes, in_features))
        self.hallucinator = nn.Linear(in_features, num_classes)
        self.selector = nn.Linear(in_features, in_features)
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        nn.init.uniform_(self.weight, -(in_features**-0.5), in_features**-0.5)

    def embed(self, features: Tensor) -> Tensor:
        """Return the meta-embeddings f' of features, [b, d]."""
        centroids = self.centroids.detach()
        with torch.no_grad():  # ‖f − c‖² without the term that all centroids share
            nearest = (centroids.square().sum(1) / 2 - features @ centroids.T).argmin(1)
        distance = torch.linalg.vector_norm(features - centroids[nearest], dim=1, keepdim=True)
        memory = self.hallucinator(features).softmax(1) @ centroids
        enriched = features + self.selector(features).tanh() * memory
        embedded: Tensor = REACH / distance.clamp(min=MIN_DISTANCE) * enriched
        return embedded

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits of all classes, [b, K], for features [b, d]."""
        embedded = self.embed(features)
        cosines = gistops.constellation_logits(
            embedded, self.weight, self.weight[:0], 1.0, backend=self.backend
        )
        norm = torch.linalg.vector_norm(embedded, dim=1, keepdim=True)
        scores: Tensor = SCALE * norm / (1 + norm) * cosines
        return scores
