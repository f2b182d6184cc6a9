"""A training whose numbers are no longer finite."""

from __future__ import annotations

import torch
from torch import nn

from .. import distributed
from ..model.sharded_head import local


class Diverged(RuntimeError):
    """The loss or a weight is not finite."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; a lower --lr or a longer --warmup-epochs may help")


def check_weights(model: nn.Module) -> None:
    """Check that all weights are finite.

    Raises:
        Diverged: one is not.
    """
    tensors = [local(parameter) for parameter in model.parameters()]
    wrong = torch.stack([~tensor.isfinite().all() for tensor in tensors]).sum()
    if distributed.all_reduce_sum(wrong):  # each process has its own classes of a divided head
        raise Diverged("a weight of the model is not finite")
