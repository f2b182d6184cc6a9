"""Losses over the targets of a batch and a random part of the other classes, with sparse gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._classifier import Classifier, LossOptions
from .._dtensor import is_dtensor
from .._functorch import is_wrapped, transforms_active

IGNORED = -100


@torch.no_grad()
def drawn_classes(classes: int, target: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """Return the classes that a step uses, sorted, [n].

    They are all targets and, uniformly without replacement, as many others as make n = share · K, or B if that is more: n does not
    depend on values, for which the host would wait.

    Args:
        classes: the number of classes K.
        target: [B], int64; -100 for rows without a class here.
        share: above 0, up to 1.
        generator: draws the others; None for the default generator of the device.
    """
    count = min(classes, max(math.ceil(share * classes), len(target)))
    keys = torch.rand(classes, generator=generator, device=target.device)
    # Random numbers are below 1. Rows without a class mark a cell of its own.
    keys = torch.cat([keys, keys.new_zeros(1)])
    keys = keys.scatter(
        0, torch.where(target == IGNORED, classes, target), 2.0
    )  # torch.vmap needs a new tensor
    return keys[:classes].topk(count, sorted=False).indices.sort().values


def sampled(
    centers: Tensor, classifier: Classifier, target: Tensor, options: LossOptions
) -> tuple[Classifier, Tensor, LossOptions]:
    """Return the classifier, the targets and the options of the drawn classes.

    Args:
        centers: those of the classifier, as the caller has them; their gradient is sparse.
        classifier: the classes of this process.
        target: as in `drawn_classes`.
        options: with vectors [K].
    """
    assert options.sample_negatives is not None
    classes = classifier.centers.shape[0]
    index = drawn_classes(classes, target, options.sample_negatives, options.generator)
    position = torch.searchsorted(index, target)
    target = torch.where(target == IGNORED, IGNORED, position)
    # Most backward formulas, such as those of parametrizations and casts, take no sparse gradient; nor does torch.func.
    sparse = torch.is_grad_enabled() and centers.requires_grad and centers.is_leaf and not transforms_active()
    rows = _Rows.apply(centers, index) if sparse else classifier.centers[index]  # type: ignore[no-untyped-call]

    def part(vector: Any) -> Any:
        return vector[index] if isinstance(vector, Tensor) and vector.dim() else vector

    options = options._replace(
        class_bias=part(options.class_bias), weight=part(options.weight), margin=part(options.margin)
    )
    return classifier._replace(centers=rows), target, options._replace(ignore_index=IGNORED)


class _Rows(torch.autograd.Function):
    """Rows of centers. The gradient of centers is a sparse tensor with these rows."""

    @staticmethod
    def forward(ctx: Any, centers: Tensor, index: Tensor) -> Tensor:
        ctx.centers = centers if is_dtensor(centers) else None
        local = centers.to_local() if is_dtensor(centers) else centers  # type: ignore[attr-defined]
        ctx.shape = local.shape
        ctx.save_for_backward(index)
        return local[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        (index,) = ctx.saved_tensors
        if not torch.compiler.is_compiling() and is_wrapped(
            grad
        ):  # sparse tensors have no rules of vmap, which is_grads_batched needs
            return grad.new_zeros(ctx.shape).index_copy(0, index, grad), None
        # Drawn classes are sorted and unique, so that the tensor is coalesced.
        sparse = torch.sparse_coo_tensor(
            index[None], grad, ctx.shape, is_coalesced=True, check_invariants=False
        )
        if ctx.centers is None:
            return sparse, None
        _add_gradient(ctx.centers, sparse)
        return None, None


@torch.no_grad()
def _add_gradient(centers: Any, sparse: Tensor) -> None:
    """Add a sparse gradient to that of a DTensor. Autograd itself cannot accumulate sparse DTensors (torch 2.11 to 2.13)."""
    old = None if centers.grad is None else centers.grad.to_local()
    centers.grad = type(centers)(sparse if old is None else old + sparse, centers._spec, requires_grad=False)
