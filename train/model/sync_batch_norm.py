"""Batch normalisation over the samples of all processes, so that the joint batch decides, not how it was divided."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..distributed import all_reduce_sum


class _Sum(torch.autograd.Function):
    """Over all processes; of gradients too, as each process's loss depends on every one's value."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return all_reduce_sum(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad.contiguous())


class _OverProcesses:
    """The forward of batch normalisation with mean and variance over all processes.

    torch's SyncBatchNorm does so on GPUs alone.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)  # type: ignore[misc, no-any-return]
        over = [i for i in range(x.dim()) if i != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = wide.new_tensor([x.numel() // x.shape[1]])
        total: Tensor = _Sum.apply(torch.cat([wide.sum(over), count]))  # type: ignore[no-untyped-call]
        count = total[-1].detach()
        mean = total[:-1] / count
        centered = wide - mean.view(shape)
        var: Tensor = _Sum.apply(centered.square().sum(over)) / count  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.num_batches_tracked += 1
            unbiased = var * count / (count - 1)
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        y: Tensor = centered * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


class _BatchNorm1d(_OverProcesses, nn.BatchNorm1d):
    pass


class _BatchNorm2d(_OverProcesses, nn.BatchNorm2d):
    pass


ON_CPU = {nn.BatchNorm1d: _BatchNorm1d, nn.BatchNorm2d: _BatchNorm2d}


def normalize_over_processes(model: nn.Module, device: torch.device) -> None:
    """Make every batch normalisation within `model` one over all processes; parameters and buffers stay the same tensors.

    Those of kinds that are not torch's own, which may do more than normalise, stay as they are, with a warning.
    """
    left = set()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            kind = type(child)
            if kind in ON_CPU and device.type == "cpu":
                child.__class__ = ON_CPU[kind]
            elif kind in ON_CPU:
                setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
            elif isinstance(child, _BatchNorm):
                left.add(kind.__name__)
    if left:
        warnings.warn(
            f"batch normalisations of the kind {', '.join(sorted(left))} have statistics of each process's own samples, "
            "not of all",
            RuntimeWarning,
            stacklevel=2,
        )
