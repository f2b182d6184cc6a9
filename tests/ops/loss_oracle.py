"""Helpers of the tests of the loss: cases, and the cross-entropy of materialized logits in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gistops

from .oracle import Sample, generator

IGNORED = -100


@dataclass(frozen=True)
class Options:
    """The options of a call besides its tensors."""

    reduction: str = "mean"
    smoothing: float = 0.0
    bias: bool = False
    weight: bool = False
    margin: str | None = None
    ignored: float = 0.2  # fraction of the rows
    target: torch.dtype = torch.int64

    @property
    def id(self) -> str:
        said = [self.reduction, f"smooth{self.smoothing}" if self.smoothing else "", self.margin or ""]
        said += ["bias" if self.bias else "", "weight" if self.weight else ""]
        return "-".join(word for word in said if word)


OPTIONS = [
    Options(),
    Options("sum", ignored=0.0, target=torch.int32),
    Options("none", bias=True),
    Options("none", weight=True, margin="logit"),
    Options("mean", bias=True, weight=True, margin="cosine"),
    Options("mean", smoothing=0.1),
    Options("none", smoothing=0.3, bias=True, weight=True),
    Options("sum", smoothing=0.1, margin="angle"),
    Options("none", smoothing=1.0, bias=True, weight=True, margin="cosine"),
    Options("mean", margin="angle", target=torch.int32),
]


@dataclass(frozen=True)
class Call:
    """The arguments of a call: x, w, δ, τ, and bias, margin, weight and target, used or not."""

    tensors: list[Tensor]
    bias: Tensor
    margin: Tensor
    weight: Tensor
    target: Tensor
    options: Options

    @classmethod
    def of(cls, sample: Sample, options: Options, seed: int) -> Call:
        source = generator(seed + 1)
        tensors = sample.tensors(seed, requires_grad=False)
        target = torch.randint(0, sample.K, (sample.B,), generator=source)
        target[torch.rand(sample.B, generator=source) < options.ignored] = IGNORED
        target[:1] = 0  # a mean needs at least one row
        bias = torch.randn(sample.K, generator=source)
        margin = torch.rand(sample.K, generator=source) * 0.5
        weight = torch.rand(sample.K, generator=source)
        return cls(tensors, bias, margin, weight, target.to(options.target), options)

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Return new leaves: x, w, δ, τ, bias, margin."""
        every = [*self.tensors, self.bias, self.margin]
        return [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in every]

    def ours(self, leaves: list[Tensor], backend: str, **more: Any) -> tuple[Tensor, Tensor]:
        """Return loss and lse by the public function."""
        o = self.options
        arguments: dict[str, Any] = {
            "class_bias": leaves[4] if o.bias else None,
            "weight": self.weight if o.weight else None,
            "margin": leaves[5] if o.margin else None,
            "margin_kind": o.margin or "logit",
            "reduction": o.reduction,
            "label_smoothing": o.smoothing,
            "return_lse": True,
            "backend": backend,
        }
        x, w, delta, tau = leaves[:4]
        made: Any
        if w.dim() == 3:
            made = gistops.subcenter_cross_entropy(x, w, tau, self.target, **arguments | more)
        else:
            made = gistops.constellation_cross_entropy(x, w, delta, tau, self.target, **arguments | more)
        return made

    def written_out(self, logits: Tensor, leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return loss and lse of logits [B, K] by the definition."""
        o, y = self.options, self.target.long()
        counted = y != IGNORED
        tau = leaves[3].to(logits.dtype)
        if o.margin:
            margin = leaves[5].to(logits.dtype)[y.clamp(min=0)]
            row = torch.arange(len(y))
            own = logits[row, y.clamp(min=0)]
            angle = (own / tau).clamp(-1, 1).acos() + margin
            lowered = {
                "logit": own - margin,
                "cosine": own - tau * margin,
                "angle": torch.where(angle > torch.pi, own - tau * margin * margin.sin(), tau * angle.cos()),
            }[o.margin]
            logits = logits.index_put((row[counted], y[counted]), lowered[counted])
        if o.bias:
            logits = logits + leaves[4].to(logits.dtype)
        weight = self.weight.to(logits.dtype) if o.weight else None
        loss = F.cross_entropy(logits, y, weight, reduction=o.reduction, label_smoothing=o.smoothing)
        return loss, logits.logsumexp(1)


def gradients(loss: Tensor, lse: Tensor, leaves: list[Tensor], seed: int) -> list[Tensor]:
    """Return the gradients of all leaves for non-uniform gradients of loss and lse; zeros for unused leaves."""
    source = generator(seed + 2)
    grads = [torch.randn(t.shape, generator=source).to(t.dtype) for t in (loss, lse)]
    made = torch.autograd.grad([loss, lse], leaves, [grads[0], 0.1 * grads[1]], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, made, strict=True)]
