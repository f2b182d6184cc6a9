"""The operands, scores and products of a loss of sub-centers [K, M, d], and those of translations beside them.

Sub-centers have centers [K, M, d] in `LaunchArgs`, and sizes of K classes and M slots. Their norms and products see the same
memory as K·M classes with one slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...operators.cross_entropy import CrossEntropyBackward, CrossEntropyForward, padded_rows
from . import gradients
from .argument_checks import check_subcenters
from .configs import tiles
from .launch_args import LaunchArgs, multiply
from .routing import Needs, Routed, Saved
from .subcenters import expand_weights_kernel, subcenter_scores_kernel


def launch_args(a: CrossEntropyForward | CrossEntropyBackward) -> LaunchArgs:
    """Check the vectors of a loss and return them ready for kernels."""
    if a.centers.dim() != 3:
        return LaunchArgs.of(a.input, a.centers, a.displacements, a.tau, a.allow_tf32)
    check_subcenters(a)
    K, M, _ = a.centers.shape
    args = LaunchArgs.of(a.input, a.centers.flatten(0, 1), a.displacements, a.tau, a.allow_tf32)
    B, _, d, _ = args.sizes
    return args._replace(centers=args.centers.view(K, M, d), sizes=(B, K, d, M))


def has_subcenters(args: LaunchArgs) -> bool:
    """Return True for the arguments of sub-centers."""
    return args.centers.dim() == 3


def as_classes(args: LaunchArgs) -> LaunchArgs:
    """Return sub-centers as K·M classes; other arguments as they are."""
    if not has_subcenters(args):
        return args
    B, K, d, M = args.sizes
    return args._replace(centers=args.centers.view(K * M, d), sizes=(B, K * M, d, 1))


def by_vector(args: LaunchArgs, center_rnorms: Tensor) -> Tensor:
    """Return the memory of center_rnorms as [K, M], the order in which the kernels of sub-centers use it.

    The ops declare it as [M, K] for all forms of the loss. Only the backward of this backend reads it.
    """
    return center_rnorms.view(args.sizes[1], args.sizes[3])


def subcenter_scores(
    args: LaunchArgs, center_rnorms: Tensor, input_rnorms: Tensor, scores: Tensor, slots: Tensor | None
) -> None:
    """Compute the logits of sub-centers, class-major, and their slots if there is memory for them."""
    B, K, _, M = args.sizes
    stride = padded_rows(B)
    products = args.input.new_empty(K * M, stride, dtype=args.acc_dtype)
    multiply(as_classes(args).centers, args.input.t(), products[:, :B])
    classes, rows, warps = args.tile_sizes.subcenters
    subcenter_scores_kernel[(tiles(K, classes) * tiles(B, rows),)](
        products, center_rnorms, input_rnorms, args.tau, scores, slots, B, K, stride, M,
        BLOCK_C=classes, BLOCK_B=rows, NEED_SLOTS=slots is not None, num_warps=warps, **args.constants("ACC"),
    )  # fmt: skip


def subcenter_gradients(
    args: LaunchArgs, saved: Saved, routed: Routed, needs: Needs, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input, sub-centers [K, M, d] and displacements [0, d], the first in `dtype`."""
    B, K, d, M = args.sizes
    weights = routed.weights
    if needs.input or needs.centers:
        weights = routed.weights.new_empty(K * M, padded_rows(B))
        classes, rows, warps = args.tile_sizes.subcenters
        expand_weights_kernel[(tiles(K, classes) * tiles(B, rows),)](
            routed.weights, saved.slots, weights, B, K, padded_rows(B), M,
            BLOCK_C=classes, BLOCK_B=rows, num_warps=warps,
        )  # fmt: skip
    routed = routed._replace(weights=weights, moments=routed.moments.view(-1))
    grad_input, grad_centers, none = gradients.from_routed(as_classes(args), saved, routed, needs, dtype)
    return grad_input, grad_centers.view(-1, M, d), none
