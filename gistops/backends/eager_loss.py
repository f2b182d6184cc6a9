"""The whole loss in eager mode. It bypasses the dispatcher, whose Python layers take longer than a small training step."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .._checks import on_device
from .._classifier import Classifier, LossOptions
from .._functorch import is_wrapped, transforms_active
from ..operators.cross_entropy import (
    MARGIN_KINDS,
    REDUCTIONS,
    CrossEntropy,
    CrossEntropyBackward,
    CrossEntropyForward,
    CrossEntropyGradients,
    gradients,
    save,
)
from ..operators.registry import cast_operands, compute_dtype

#: Maximum memory of the scores and slots that the forward keeps for the backward. It is a constant, because the free
#: memory depends on other processes.
MAX_KEPT_BYTES = 2 << 30
Forward = Callable[[CrossEntropyForward], CrossEntropy]
Backward = Callable[[CrossEntropyBackward], CrossEntropyGradients]
#: Park the scores in the memory of the gradient of the centers, where the op cross_entropy_parks returns True.
PARK_SCORES = True
#: Backend -> the transforms whose loss its ops compute whole. The loss of other transforms is made from its parts.
WHOLE_LOSS = {
    "cuda": ("translation", "subcenters", "rotation"),
    "triton": ("translation", "subcenters", "rotation"),
}
#: Namespace -> Python kernels of the loss. The compiled ones are called through their ops.
python_kernels: dict[str, tuple[Forward, Backward]] = {}
_PLAIN = (Tensor, torch.nn.Parameter)
#: Take from the arguments of the whole loss those of the ops with parked scores.
_parked_forward_arguments = attrgetter(
    *("input", "centers", "displacements", "tau", "target", "class_bias", "weight", "margin"),
    *("margin_kind", "reduction", "ignore_index", "label_smoothing"),
)
_parked_backward_arguments = attrgetter(
    *("grad_loss", "grad_lse", "input", "centers", "displacements", "tau"),
    *("target", "class_bias", "weight", "margin"),
    *("center_rnorms", "input_rnorms", "rows", "scalars"),
    *("margin_kind", "reduction", "ignore_index", "label_smoothing"),
    *("need_input", "need_displacements", "need_tau", "need_bias", "need_margin"),
)


def cross_entropy(
    ops: Any,
    input: Tensor,
    classifier: Classifier,
    coeffs: tuple[Tensor | None, Tensor | None],
    target: Tensor,
    options: LossOptions,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, lse and in_range of `CrossEntropy`; differentiable once.

    Args:
        ops: the namespace of a backend that has the ops of the whole loss.
        classifier: of a transform in WHOLE_LOSS; with the centers of rotations, without their displacements.
        coeffs: input_coeffs and class_coeffs of rotations.
    """
    centers, displacements, tau = classifier[:3]
    dtype = compute_dtype(input, centers, displacements)
    margin = options.margin
    if margin is not None and not isinstance(margin, Tensor):
        margin = on_device(margin, dtype, input.device)
    tensors: tuple[Any, ...]
    tensors = (
        input,
        centers,
        displacements,
        tau,
        *coeffs,
        target,
        options.class_bias,
        options.weight,
        margin,
    )
    graph = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    plain = not input.is_meta and all(x is None or type(x) in _PLAIN for x in tensors)
    eager = plain and not torch.compiler.is_compiling() and not transforms_active()
    if eager and input.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        tensors = (*cast_operands(ops, "cuda", tensors[:3]), *tensors[3:])
    can_park = eager and graph and classifier.transform == "translation"
    park = can_park and _can_park(ops, *tensors[:3])
    keep_scores = (
        graph and not park and input.shape[0] * centers.shape[0] * (dtype.itemsize + 1) <= MAX_KEPT_BYTES
    )
    values = (
        MARGIN_KINDS[options.margin_kind], REDUCTIONS[options.reduction], options.ignore_index,
        options.label_smoothing, keep_scores, allow_tf32,
    )  # fmt: skip
    if not eager:
        output = ops.cross_entropy_forward.default(*tensors, *values)
        return output[0], output[1], output[2]
    if graph:
        loss, lse, in_range = _Function.apply(ops, park, *tensors, *values)  # type: ignore[no-untyped-call]
        return loss, lse, in_range
    return _forward(ops, CrossEntropyForward._make((*tensors, *values)))[:3]


def _can_park(ops: Any, input: Tensor, centers: Tensor, displacements: Tensor) -> bool:
    """Return True if the forward can park its scores in the memory of the gradient of the centers."""
    return (
        PARK_SCORES
        and centers.requires_grad
        and centers.dtype.itemsize == 2
        and ops.name not in python_kernels
        and bool(ops.cross_entropy_parks.default(input, centers, displacements))
    )


class _Function(torch.autograd.Function):
    """The kernels of `cross_entropy_forward` and `cross_entropy_backward`, without their ops."""

    @staticmethod
    def forward(ctx: Any, ops: Any, park: bool, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        arguments = CrossEntropyForward(*inputs)
        ctx.ops, ctx.stash = ops, []
        if park:
            ctx.stash.append(torch.empty_like(arguments.centers, memory_format=torch.contiguous_format))
        output = _forward(ops, arguments, *ctx.stash)
        ctx.mark_non_differentiable(output.in_range)
        save(ctx, arguments, output)
        return output[:3]

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        # A vmap over the gradients, as by is_grads_batched, calls the op once per gradient and leaves the stash.
        stash = ctx.stash.pop() if ctx.stash and not is_wrapped(grad_loss, grad_lse) else None

        def kernel(*arguments: Any) -> tuple[Tensor, ...]:
            record = CrossEntropyBackward(*arguments)
            return _backward(ctx.ops, record, stash if record.need_centers else None)

        # The op raises the error for second derivatives, and serves a vmap over gradients.
        if torch.is_grad_enabled() or is_wrapped(grad_loss, grad_lse):
            kernel = ctx.ops.cross_entropy_backward.default
        return None, None, *gradients(kernel, ctx, grad_loss, grad_lse, ctx.needs_input_grad[2:])


def _forward(ops: Any, arguments: CrossEntropyForward, stash: Tensor | None = None) -> CrossEntropy:
    """Call the kernels of the forward; stash: memory for parked scores."""
    if ops.name in python_kernels:
        return python_kernels[ops.name][0](arguments)
    with torch._C._AutoDispatchBelowAutograd():
        if stash is None:
            return CrossEntropy(*ops.cross_entropy_forward.default(*arguments))
        taken = _parked_forward_arguments(arguments)
        loss, lse, in_range, *saved = ops.parked_cross_entropy_forward.default(*taken, stash)
    scores, slots = loss.new_empty(0, 0), loss.new_empty(0, 0, dtype=torch.uint8)
    return CrossEntropy(loss, lse, in_range, scores, slots, *saved)


def _backward(ops: Any, a: CrossEntropyBackward, stash: Tensor | None) -> tuple[Tensor, ...]:
    """Call the kernels of the backward; stash: the memory that holds parked scores."""
    if ops.name in python_kernels:
        return python_kernels[ops.name][1](a)
    with torch._C._AutoDispatchBelowAutograd():
        output: tuple[Tensor, ...]
        if stash is None:
            output = ops.cross_entropy_backward.default(*a)
            return output
        output = ops.parked_cross_entropy_backward.default(*_parked_backward_arguments(a), stash)
    no_coeffs = a.lse.new_empty(0)
    return output[0], stash, *output[1:3], no_coeffs, no_coeffs, *output[3:]
