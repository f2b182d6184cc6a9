"""The best classes, without logits [B, K]."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from .._checks import (
    check_class_vector,
    check_constellation,
    check_integer,
    check_some_classes,
    check_subcenters,
    check_transform,
)
from ..backends import reference
from . import mlp as networks
from . import rotation
from .fused import allow_tf32, family, no_displacements
from .logits import Transform


@torch.no_grad()
def constellation_topk(
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor | float,
    k: int,
    *,
    transform: Transform = "translation",
    axis: Tensor | None = None,
    mlp: tuple[Tensor, Tensor] | None = None,
    class_bias: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """The k classes with the largest logits, largest first, in memory that does not grow with K.

    Not differentiable. Of equal logits the lowest class comes first; NaN counts as the largest, as in `torch.topk`.

    Args:
        input, centers, displacements, tau, transform, axis, mlp, backend: as in `constellation_logits`.
        k: number of classes, 1 to K.
        class_bias: added to the logits, [K], floating.
        return_lse: also return the log-sum-exp of all logits (with their bias): `(values - lse[:, None]).exp()` are
            probabilities over all classes.

    Returns:
        values [B, k], in the dtype of the logits; classes [B, k], int64; slots [B, k], uint8, which vector of the class
        won; with `return_lse` also lse [B].

    Raises:
        TypeError, ValueError, gistops.BackendUnavailable: as `constellation_logits`; the message names the argument.
    """
    tau = check_constellation(input, centers, displacements, tau)
    check_transform(transform, axis, mlp, input)
    return topk(input, centers, displacements, tau, k, class_bias, return_lse, backend, axis=axis, mlp=mlp)


@torch.no_grad()
def subcenter_topk(
    input: Tensor,
    centers: Tensor,
    tau: Tensor | float,
    k: int,
    *,
    class_bias: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """`constellation_topk` for the free centres [K, M, d] of `subcenter_logits`."""
    tau = check_subcenters(input, centers, tau)
    return topk(input, centers, no_displacements(input), tau, k, class_bias, return_lse, backend)


def topk(
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor,
    k: int,
    class_bias: Tensor | None,
    return_lse: bool,
    backend: str | None,
    norms: Tensor | None = None,
    axis: Tensor | None = None,
    mlp: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Arguments that were checked; norms: of `center_norms`, for the `cpu` backend."""
    classes = check_some_classes(centers)
    k = check_integer("k", k, 1, classes)
    if class_bias is not None:
        check_class_vector("class_bias", class_bias, classes, input)
    chosen = backends.choose(input.device.type, backend)
    if chosen == "reference":
        made = reference.topk(input, centers, displacements, tau, class_bias, k, axis, mlp)
    elif mlp is not None:
        made = networks.topk(chosen, input, centers, displacements, tau, mlp, class_bias, k, return_lse)
    else:
        operator = getattr(torch.ops.gistops, f"{family(chosen)}_topk").default
        both: tuple[Tensor | None, Tensor | None] = (None, None)
        if axis is not None:
            both = rotation.tables(input, centers, displacements, axis)
            displacements = no_displacements(input)
        made = operator(
            input, centers, displacements, tau, class_bias, *both, k, return_lse, allow_tf32(chosen), norms
        )
    values, best, slots, lse = made
    return (values, best, slots, lse) if return_lse else (values, best, slots)
