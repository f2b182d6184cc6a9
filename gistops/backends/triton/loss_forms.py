"""The operands, scores and products of the losses of sub-centers and rotations, and those of translations beside them.

Sub-centers have centers [K, M, d] in `LaunchArgs`, and sizes of K classes and M slots. Their norms and products see the same
memory as K·M classes with one slot. Rotations have coefficients there, and sizes of one slot, because all slots of a class
share its center, its product and its norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...operators.cross_entropy import CrossEntropyBackward, CrossEntropyForward, padded_rows
from . import configs, gradients
from .argument_checks import check_coeffs, check_subcenters
from .configs import grouped, tiles
from .launch_args import LaunchArgs, multiply
from .rotations import grad_coeffs_kernel, rotation_scores_kernel
from .routing import Needs, Routed, Saved
from .subcenters import expand_weights_kernel, subcenter_scores_kernel


def launch_args(a: CrossEntropyForward | CrossEntropyBackward) -> LaunchArgs:
    """Check the vectors and coefficients of a loss and return them ready for kernels."""
    check_coeffs(a)
    if a.centers.dim() != 3:
        args = LaunchArgs.of(a.input, a.centers, a.displacements, a.tau, a.allow_tf32)
        if a.input_coeffs is None or a.class_coeffs is None:
            return args
        x, y = (coeffs.to(args.acc_dtype).contiguous() for coeffs in (a.input_coeffs, a.class_coeffs))
        return args._replace(input_coeffs=x, class_coeffs=y)
    check_subcenters(a)
    K, M, _ = a.centers.shape
    args = LaunchArgs.of(a.input, a.centers.flatten(0, 1), a.displacements, a.tau, a.allow_tf32)
    B, _, d, _ = args.sizes
    return args._replace(centers=args.centers.view(K, M, d), sizes=(B, K, d, M))


def has_subcenters(args: LaunchArgs) -> bool:
    """Return True for the arguments of sub-centers."""
    return args.centers.dim() == 3


def has_score_kernel(args: LaunchArgs) -> bool:
    """Return True for the forms whose logits are made from the products by a kernel of their own."""
    return has_subcenters(args) or args.input_coeffs is not None


def chunk_of(args: LaunchArgs, classes: slice) -> LaunchArgs:
    """Return the arguments of some classes."""
    B, _, d, M = args.sizes
    centers = args.centers[classes]
    coeffs = None if args.class_coeffs is None else args.class_coeffs[:, :, classes]
    return args._replace(centers=centers, class_coeffs=coeffs, sizes=(B, centers.shape[0], d, M))


def memory_per_class(args: LaunchArgs, keep_scores: bool) -> int:
    """Return the elements that a class takes in a chunk: its scores, products, or partials of its coefficients' gradient.

    Scores do not count if they are kept for all classes. 0 means that one chunk holds all classes.
    """
    B, rows = args.sizes[0], padded_rows(args.sizes[0])
    if has_subcenters(args):
        return rows * args.sizes[3]  # products beside the scores
    partials = tiles(B, args.tile_sizes.subcenters[1]) * 2 * args.coeff_slots
    return partials if keep_scores else max(rows, partials)


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


def compute_scores(
    args: LaunchArgs, center_rnorms: Tensor, input_rnorms: Tensor, scores: Tensor, slots: Tensor | None
) -> None:
    """Compute the logits of sub-centers or rotations, class-major, and their slots if there is memory for them."""
    B, K, _, M = args.sizes
    stride = padded_rows(B)
    if args.class_coeffs is not None:
        multiply(args.centers, args.input.t(), scores[:, :B])
        classes, rows, warps = args.tile_sizes.subcenters
        rotation_scores_kernel[(tiles(K, classes) * tiles(B, rows),)](
            scores, slots, center_rnorms, input_rnorms, args.tau, args.input_coeffs, args.class_coeffs,
            B, K, stride, args.coeff_slots, args.class_coeffs.stride(1),
            BLOCK_C=classes, BLOCK_B=rows, NEED_SLOTS=slots is not None, num_warps=warps, **args.constants("ACC"),
        )  # fmt: skip
        return
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


def coeff_partials(
    args: LaunchArgs, saved: Saved, weights: Tensor, needs: Needs
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Return H' in the dtype that the products read, and the partials of the coefficients' gradients.

    Those are ∂X [groups, B, M] and ∂Y [row tiles, 2, M, K] of rotations. Other forms have none, and H' as it is.
    """
    if args.class_coeffs is None:
        return weights, None
    B, K, _, _ = args.sizes
    M, (classes, rows, warps) = args.coeff_slots, args.tile_sizes.subcenters
    group_tiles, groups = grouped(K, B, (classes, rows))
    input_partials = weights.new_empty(groups, B, M)
    class_partials = weights.new_empty(tiles(B, rows), 2, M, K)
    rounds = args.store_dtype != weights.dtype and (needs.input or needs.centers)
    rounded = torch.empty_like(weights, dtype=args.store_dtype) if rounds else weights
    grad_coeffs_kernel[(groups * tiles(B, rows),)](
        weights, rounded, saved.slots, saved.center_rnorms, saved.input_rnorms, args.input_coeffs, args.class_coeffs,
        input_partials, class_partials, B, K, padded_rows(B), M, args.class_coeffs.stride(1), group_tiles,
        BLOCK_C=classes, BLOCK_B=rows, ROUND=rounds, MAX_WEIGHT=configs.max_weight(rounded.dtype), num_warps=warps,
        **args.constants("ACC"),
    )  # fmt: skip
    return rounded, (input_partials, class_partials)
