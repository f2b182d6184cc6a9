"""The launches of a loss's backward: from kept scores, or in chunks of classes whose products are computed again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...operators.cross_entropy import CrossEntropyBackward, padded_rows
from . import configs, gradients, loss_forms
from .configs import power_of_two
from .configs import tiles as tiles_of
from .launch_args import LaunchArgs, multiply
from .logits import compute_norms
from .loss_scores import Chunk, Norms, Partials, chunk_size, chunks, rescore_cancelled
from .route_loss_grad import route_loss_grad_kernel
from .routing import Needs, Routed, RoutingPartials, Saved, reduce_partials

#: Index of a gradient with one part per class -> its dimension of classes: centers, class_coeffs, bias and margin.
BY_CLASS = {1: 0, 5: 2, 6: 0, 7: 0}


def loss_grad_tile(args: LaunchArgs) -> tuple[int, int, int]:
    """Return the classes and rows of a tile of route_loss_grad_kernel, and its warps."""
    return args.tile_sizes.route_loss_grad if args.sizes[3] <= 32 else args.tile_sizes.route_loss_grad_many


def from_scores(
    args: LaunchArgs, a: CrossEntropyBackward, needs: Needs, routing: dict[str, Any]
) -> tuple[Tensor, ...]:
    """Return all gradients, from the scores that the forward has kept."""
    (c,) = chunks(args, args.sizes[1], loss_grad_tile(args))
    # The gradient of the logits is stored for pairs that cancel only.
    grad = torch.empty_like(a.scores) if args.sizes[3] > 1 else a.scores
    saved = Saved(grad, a.scores, a.slots, a.center_rnorms, a.input_rnorms, True)
    return _gradients(c, saved, needs, _route(c, saved, None, needs, routing), args.store_dtype)


def recomputed(
    args: LaunchArgs, a: CrossEntropyBackward, needs: Needs, routing: dict[str, Any]
) -> tuple[Tensor, ...]:
    """Return all gradients, from recomputed products."""
    return _sum_of_chunks(args, _recomputed_chunks(args, a, needs, routing))


def _recomputed_chunks(
    args: LaunchArgs, a: CrossEntropyBackward, needs: Needs, routing: dict[str, Any]
) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    B, K, _, M = args.sizes
    new, acc = args.input.new_empty, args.acc_dtype
    shifts = new(M, B, dtype=acc)
    compute_norms(args, shifts, None, new(B, dtype=acc))
    size = min(chunk_size(args, False), K)
    scores, slots = new(size, padded_rows(B), dtype=acc), new(size, padded_rows(B), dtype=torch.uint8)
    for c in chunks(args, size, loss_grad_tile(args)):
        count = c.args.sizes[1]
        classes = slice(c.first_class, c.first_class + count)
        z, winners = scores[:count], slots[:count]
        norms = Norms(a.center_rnorms[:, classes].contiguous(), a.input_rnorms, shifts)
        multiply(c.args.centers, args.input.t(), z[:, :B])
        # The partials of the log-sum-exp are known; they are computed again beside the scores, and not used.
        unused = Partials.allocate(args, c.groups, True)
        rescore_cancelled(c._replace(first_group=0), a, z, winners, norms, unused)
        saved = Saved(z, z, winners, norms.center_rnorms, a.input_rnorms, True)
        routed = _route(c, saved, shifts, needs, routing)
        yield classes, _gradients(c, saved, needs, routed, args.store_dtype if count == K else acc)


def in_chunks_of_logits(
    args: LaunchArgs, a: CrossEntropyBackward, needs: Needs, routing: dict[str, Any]
) -> tuple[Tensor, ...]:
    """Return all gradients of sub-centers or rotations, from kept or recomputed logits."""
    return _sum_of_chunks(args, _chunks_of_logits(args, a, needs, routing))


def _chunks_of_logits(
    args: LaunchArgs, a: CrossEntropyBackward, needs: Needs, routing: dict[str, Any]
) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    B, K, _, _ = args.sizes
    new, acc = args.input.new_empty, args.acc_dtype
    size = min(chunk_size(args, a.scores.numel() > 0), K)
    scores, slots = a.scores, a.slots
    if not a.scores.numel():
        scores, slots = new(size, padded_rows(B), dtype=acc), new(size, padded_rows(B), dtype=torch.uint8)
    for c in chunks(args, size, loss_grad_tile(args)):
        count = c.args.sizes[1]
        classes = slice(c.first_class, c.first_class + count)
        if loss_forms.has_subcenters(args):
            rnorms = loss_forms.by_vector(args, a.center_rnorms)[classes]
        else:
            rnorms = a.center_rnorms[:, classes]  # one row
        z, winners = (x[classes] if a.scores.numel() else x[:count] for x in (scores, slots))
        if not a.scores.numel():
            loss_forms.compute_scores(c.args, rnorms, a.input_rnorms, z, winners)
        saved = Saved(z, z, winners, rnorms, a.input_rnorms, True)
        routed = _route(c, saved, None, needs, routing)
        yield classes, _gradients(c, saved, needs, routed, args.store_dtype if count == K else acc)


def _sum_of_chunks(
    args: LaunchArgs, computed: Iterator[tuple[slice, tuple[Tensor, ...]]]
) -> tuple[Tensor, ...]:
    """Return the gradients of all chunks together. Sums are accumulated in `args.acc_dtype`."""
    K = args.sizes[1]
    sums: list[Tensor] = []
    for classes, parts in computed:
        if classes.stop - classes.start == K:
            return parts
        if not sums:
            sums = [_zeros(x, BY_CLASS.get(i), K) for i, x in enumerate(parts)]
        for i, (total, more) in enumerate(zip(sums, parts, strict=True)):
            if not more.numel():
                continue
            if i in BY_CLASS:
                total.narrow(BY_CLASS[i], classes.start, classes.stop - classes.start).copy_(more)
            else:
                total += more
    return tuple(sums)


def _zeros(part: Tensor, class_dim: int | None, classes: int) -> Tensor:
    """Return memory for the gradient of all classes: zeros, or uninitialized memory where each class has its own part."""
    if class_dim is None or not part.numel():
        return torch.zeros_like(part)
    shape = list(part.shape)
    shape[class_dim] = classes
    return part.new_empty(shape)


def _gradients(
    c: Chunk, saved: Saved, needs: Needs, routed: Routed, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Return all gradients of a chunk; those of input and displacements are in `dtype`."""
    compute = loss_forms.subcenter_gradients if loss_forms.has_subcenters(c.args) else gradients.from_routed
    vectors = compute(c.args, saved, routed, needs, dtype)
    none = routed.grad_tau.new_empty(0)
    coeffs = (none if x is None else x for x in (routed.input_coeffs, routed.class_coeffs))
    return *vectors, routed.grad_tau, *coeffs, routed.grad_bias, routed.grad_margin


def _route(c: Chunk, saved: Saved, shifts: Tensor | None, needs: Needs, routing: dict[str, Any]) -> Routed:
    """Return H' and its sums: from logits, or with `shifts` from products."""
    args = c.args
    B, K, _, M = args.sizes
    splits = tiles_of(B, c.tile[1])
    partials = RoutingPartials.allocate(args, needs, splits, c.groups)
    options: dict[str, Any] = {
        "B": B, "K": K, "stride": padded_rows(B), "M": M, "first_class": c.first_class,
        "MAX_WEIGHT": configs.max_weight(partials.weights.dtype), **partials.switches(), **routing,
    }  # fmt: skip
    unrolled = args.tile_sizes.route_loss_grad_unrolled
    route_loss_grad_kernel[(splits * c.groups,)](
        saved.grad, saved.logits, saved.slots, saved.center_rnorms, shifts, saved.input_rnorms, args.tau, *partials,
        group_tiles=c.group_tiles, BLOCK_C=c.tile[0], BLOCK_B=c.tile[1], BLOCK_S=power_of_two(M),
        UNROLLED_SLOTS=configs.unrolled_slots(M) if unrolled else 0, PRODUCTS=shifts is not None,
        INTERLEAVED=loss_forms.has_subcenters(args),
        num_warps=c.tile[2], **options,
    )  # fmt: skip
    weights, coeffs = loss_forms.coeff_partials(args, saved, partials.weights, needs)
    partials = partials._replace(weights=weights)
    return reduce_partials(args, partials, c.group_tiles * c.tile[0], c.tile[1], coeffs)
