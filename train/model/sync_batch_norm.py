"""Batch normalization with statistics over the samples of all processes, so that they do not depend on the split."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..distributed import all_reduce_sum
from .precision import wide


class _AllReduceSum(torch.autograd.Function):
    """All-reduce in the forward and in the backward, because each process's loss depends on the values of all processes."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return all_reduce_sum(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad.contiguous())


class _SyncForward:
    """The forward of batch normalization with the mean and variance over all processes, for the CPU.

    torch's SyncBatchNorm supports GPUs only.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)  # type: ignore[misc, no-any-return]
        dims = [i for i in range(x.dim()) if i != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        values = wide(x)
        count = values.new_tensor([x.numel() // x.shape[1]])
        total: Tensor = _AllReduceSum.apply(torch.cat([values.sum(dims), count]))  # type: ignore[no-untyped-call]
        count = total[-1].detach()
        mean = total[:-1] / count
        centered = values - mean.view(shape)
        var: Tensor = _AllReduceSum.apply(centered.square().sum(dims)) / count  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.num_batches_tracked += 1
            unbiased = var * count / (count - 1)
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        y: Tensor = centered * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


class _BatchNorm1d(_SyncForward, nn.BatchNorm1d):
    pass


class _BatchNorm2d(_SyncForward, nn.BatchNorm2d):
    pass


CPU_CLASSES = {nn.BatchNorm1d: _BatchNorm1d, nn.BatchNorm2d: _BatchNorm2d}


def convert_sync_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Synchronize every batch normalization in `model`, in place; parameters and buffers stay the same tensors.

    Subclasses of torch's batch normalizations, which may do more than normalize, are left as they are, with a warning.
    """
    unconverted = set()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            kind = type(child)
            if kind in CPU_CLASSES and device.type == "cpu":
                child.__class__ = CPU_CLASSES[kind]
            elif kind in CPU_CLASSES:
                setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
            elif isinstance(child, _BatchNorm):
                unconverted.add(kind.__name__)
    if unconverted:
        warnings.warn(
            f"batch normalizations of type {', '.join(sorted(unconverted))} are not synchronized: their statistics are those of "
            "each process's own samples",
            RuntimeWarning,
            stacklevel=2,
        )
