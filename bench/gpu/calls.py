"""The call of a variant: its forward, step or loss step on given tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gistops

from .. import baselines
from ..problem import Tensors, make_labels
from . import settings
from .variants import BEST, NARROW, TABLE, Variant

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # input, weight, labels -> mean loss
Call = Callable[[], Any]


def make_call(name: str, kind: str, arguments: Tensors, precision: str) -> Call:
    """Return a call of a variant: its logits, its best values and classes, or a step that leaves gradients and returns the loss.

    Args:
        name: name of a variant.
        kind: one of variants.KINDS.
        arguments: input, centers, displacements, tau.
        precision: a key of roofline.WIDTHS.
    """
    variant = TABLE[name]
    plain = _call(variant, kind, arguments)
    if not variant.settings:
        return plain

    def forced() -> Any:
        with settings.applied(variant.settings, precision):
            return plain()

    return forced


def _call(variant: Variant, kind: str, arguments: Tensors) -> Call:
    if kind == "loss" and variant.ours:
        return _loss_step(gistops_loss(variant.backend, variant.cosine, variant.vectors), arguments)
    if kind == "loss" and variant.family == "peer":
        return _loss_step(_peer(variant.name), arguments)
    if kind == "topk" and variant.ours:
        return lambda: gistops.constellation_topk(
            *arguments, best_classes(arguments), backend=variant.backend
        )[:2]
    head = _head(variant)
    if kind == "topk":

        def best() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return tuple(head(*arguments).topk(best_classes(arguments)))

        return best
    if kind == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return head(*arguments)

        return forward

    # Half-precision logits are converted to float32 as autocast does, except in the variants that measure this cost.
    def loss(*given: Tensor) -> Tensor:
        logits = head(*given[:4])
        return F.cross_entropy(logits if variant.narrow else logits.float(), given[4])

    return _loss_step(loss, arguments)


def best_classes(arguments: Tensors) -> int:
    """Return k of a top-k: all classes if there are fewer than usual."""
    return min(BEST, len(arguments[1]))


def _head(variant: Variant) -> Callable[..., Tensor]:
    """Return the logits function. Compiled variants have static shapes; the caller resets the compile cache."""
    if variant.ours:

        def head(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor) -> Tensor:
            delta = delta.detach()[:0] if variant.cosine else delta
            outputs = gistops.constellation_logits(
                x,
                w,
                delta,
                tau,
                return_slots=variant.slots,
                logits_dtype=x.dtype if variant.narrow else None,
                backend=variant.backend,
            )
            return outputs if isinstance(outputs, Tensor) else outputs[0]

        return head
    function = baselines.LOGITS[
        "linear" if variant.name == NARROW else variant.name.removesuffix(" compiled")
    ]
    return torch.compile(function, fullgraph=True, dynamic=False) if variant.compiled else function


def gistops_loss(backend: str, cosine: bool = False, vectors: str = "") -> Callable[..., Tensor]:
    """Return the mean constellation loss without materialized logits.

    Args:
        cosine: without displacements.
        vectors: "rotation": the displacements rotate the centers; "subcenters": two adjacent centers are the sub-centers of
            one class.
    """

    def loss(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor, labels: Tensor) -> Tensor:
        if vectors == "subcenters":
            pairs = w[: len(w) // 2 * 2].unflatten(0, (-1, 2))
            value = gistops.subcenter_cross_entropy(x, pairs, tau, labels % len(pairs), backend=backend)
        else:
            delta = delta.detach()[:0] if cosine else delta
            given: dict[str, Any] = {}
            if vectors == "rotation":
                axis = torch.linspace(-1, 1, w.shape[1], dtype=w.dtype, device=w.device)
                given = {"transform": "rotation", "axis": axis}
            value = gistops.constellation_cross_entropy(x, w, delta, tau, labels, backend=backend, **given)
        assert isinstance(value, Tensor)
        return value

    return loss


def _loss_step(loss: Callable[..., Tensor], arguments: Tensors) -> Call:
    labels = make_labels(arguments)

    def run() -> Tensor:
        for argument in arguments:
            argument.grad = None
        value = loss(*arguments, labels)
        value.backward()
        return value.detach()

    return run


def _library(name: str) -> Loss:
    if name == "torch linear_cross_entropy":
        return baselines.torch_linear_cross_entropy
    if name == "CCE":
        from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found]

        return lambda x, w, labels: linear_cross_entropy(x, w, labels)
    from liger_kernel.transformers import (  # type: ignore[import-not-found]
        LigerFusedLinearCrossEntropyLoss,
    )

    liger = LigerFusedLinearCrossEntropyLoss()
    return lambda x, w, labels: liger(w, x, labels)


def _peer(name: str) -> Callable[..., Tensor]:
    """Return a library's loss of a linear layer, or of a cosine classifier."""
    loss = _library(name.removesuffix(", cosine"))
    if not name.endswith(", cosine"):
        return lambda x, w, delta, tau, labels: loss(x, w, labels)
    return lambda x, w, delta, tau, labels: loss((tau * F.normalize(x)).to(x.dtype), F.normalize(w), labels)
