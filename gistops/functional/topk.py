"""The classes with the largest logits, without logits [B, K]."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from .._checks import check_class_vector, check_classifier, check_some_classes
from .._classifier import Classifier, Transform
from .._dtensor import is_dtensor
from .._numbers import check_integer
from ..backends import reference
from .leading import restore, rows
from .transforms import mlp as mlp_transform
from .transforms import rotation


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
    """Return the k classes with the largest logits of each row, without materializing the logits.

    The memory grows with B·k, not with B·K, so that a k near K saves none. Not differentiable. Ties are broken by the lower
    class. NaN counts as the largest value, as in `torch.topk`.

    Args:
        input, centers, displacements, tau, transform, axis, mlp, backend: as in `constellation_logits`.
        k: number of classes, from 1 to K.
        class_bias: added to the logits, [K], floating-point.
        return_lse: also return the log-sum-exp over all classes, including the bias: `(values - lse[..., None]).exp()` are
            probabilities over all classes. Infinite scores count as in `torch.logsumexp`: the result is +inf if a score is
            +inf, -inf if all scores are -inf, and NaN if a score is NaN.

    Returns:
        Values [..., k] in descending order, in the dtype of the logits; classes [..., k], int64; slots [..., k], uint8. With
        `return_lse` also lse, [...].

    Raises:
        TypeError, ValueError, gistops.BackendUnavailable: as in `constellation_logits`; the message names the argument.
    """
    classifier = Classifier(centers, displacements, tau, transform, axis, mlp)  # type: ignore[arg-type]
    return topk(input, classifier, k, class_bias, return_lse, backend)


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
    """Return the k classes with the largest `subcenter_logits` of each row.

    Arguments, returns and errors are those of `constellation_topk`, with centers [K, M, d].
    """
    classifier = Classifier(centers, None, tau, "subcenters")  # type: ignore[arg-type]  # the check adds displacements
    return topk(input, classifier, k, class_bias, return_lse, backend)


def topk(
    input: Tensor,
    classifier: Classifier,
    k: int,
    class_bias: Tensor | None,
    return_lse: bool,
    backend: str | None,
    norms: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return the top k; the arguments are unchecked. norms: from `center_norms`, for the `cpu` backend."""
    if is_dtensor(classifier.centers):
        from .sharded.topk import topk  # imports torch.distributed.tensor, which most processes never need

        return topk(input, classifier, k, class_bias, return_lse, backend)
    return local_topk(input, check_classifier(input, classifier), k, class_bias, return_lse, backend, norms)


def local_topk(
    input: Tensor,
    classifier: Classifier,
    k: int,
    class_bias: Tensor | None,
    return_lse: bool,
    backend: str | None,
    norms: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return the top k of a checked classifier whose centers are a plain tensor."""
    classes = check_some_classes(classifier.centers)
    k = check_integer("k", k, 1, classes)
    if class_bias is not None:
        check_class_vector("class_bias", class_bias, classes, input)
    chosen = backends.choose(input.device.type, backend)
    ops, allow_tf32 = backends.ops(chosen), backends.allow_tf32(chosen)
    whole, input = input, rows(input)
    if chosen == "reference":
        outputs = reference.topk(input, classifier, class_bias, k)
    elif classifier.mlp is not None:
        outputs = mlp_transform.topk(ops, input, classifier, class_bias, k, return_lse, allow_tf32)
    else:
        input, centers, displacements, *turns = rotation.operands(input, classifier, chosen)
        tensors = (input, centers, displacements, classifier.tau, class_bias, *turns)
        outputs = ops.topk.default(*tensors, k, return_lse, allow_tf32, norms)
    values, best, slots = (restore(x, whole) for x in outputs[:3])
    lse = restore(outputs[3], whole) if return_lse else outputs[3]
    return (values, best, slots, lse) if return_lse else (values, best, slots)
