"""Weights of the classes by their effective number of samples."""

from __future__ import annotations

import math

from torch import Tensor


def class_balanced_weights(counts: Tensor, beta: float) -> Tensor:
    """Return class weights in inverse proportion to the effective number of samples, [K] float32, with mean 1.

        weight_k ∝ (1 - β) / (1 - β^n_k)        (Cui, Jia, Lin, Song, Belongie, CVPR 2019, equation 5)

    β = 0 weighs all classes equally; β close to 1 weighs a class by 1 / n_k.

    Args:
        counts: the number of training samples of each class, [K], at least 1.
        beta: β, at least 0 and below 1.
    """
    log_beta = math.log(beta) if beta > 0 else -math.inf
    weights = 1 / -(counts.double() * log_beta).expm1()
    return (weights / weights.mean()).float()
