"""The launches of `cross_entropy_forward` and `cross_entropy_backward` of `torch.ops.gistops_triton`.

The forward takes six launches beside the product W f', the backward six beside the product H'W. With `keep_scores` the
forward keeps scores and slots, class-major, for the backward. Otherwise both directions work in chunks of classes, and
the backward recomputes the scores. Nothing here waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ...operators.cross_entropy import (
    CrossEntropy,
    CrossEntropyBackward,
    CrossEntropyForward,
    CrossEntropyGradients,
    padded_rows,
)
from . import configs, gradients
from .argument_checks import check_loss, check_saved_loss
from .cancellation_lse import rescore_cancelled_lse_kernel
from .configs import grouped, power_of_two
from .configs import tiles as tiles_of
from .launch_args import LaunchArgs, multiply, on_device
from .logits import compute_norms, like_argument
from .lse import lse_kernel
from .route_loss_grad import route_loss_grad_kernel
from .routing import Needs, Routed, RoutingPartials, Saved, reduce_partials
from .row_loss import reduce_loss_kernel, row_loss_kernel
from .tile_tables import ROW_LOSS

Loss = TypeVar("Loss", CrossEntropyForward, CrossEntropyBackward)
CHUNK_ELEMENTS = 1 << 25  # maximum number of scores in a chunk, if scores are not kept


class Chunk(NamedTuple):
    """A chunk of consecutive classes, and how the kernels divide it."""

    first_class: int
    args: LaunchArgs  # with the chunk's centers
    tile: tuple[int, int, int]  # classes, rows, warps
    group_tiles: int  # class tiles per group
    groups: int
    first_group: int


class Partials(NamedTuple):
    """The tensors between lse_kernel and row_loss_kernel."""

    target_logits: Tensor  # [B]
    lse: Tensor  # [3, groups, B], or [2, groups, B] without label smoothing
    class_sums: Tensor  # [2, groups]

    @classmethod
    def allocate(cls, args: LaunchArgs, groups: int, smoothing: bool) -> Partials:
        """Return uninitialized tensors."""
        B, new, acc = args.sizes[0], args.input.new_empty, args.acc_dtype
        return cls(new(B, dtype=acc), new(2 + smoothing, groups, B, dtype=acc), new(2, groups, dtype=acc))


def chunks(args: LaunchArgs, size: int, tile: tuple[int, int, int]) -> Iterator[Chunk]:
    """Yield chunks of at most `size` classes."""
    B, K, d, M = args.sizes
    tile = tile[0], min(tile[1], power_of_two(max(B, 16))), tile[2]
    count = 0
    for first in range(0, K, size):
        centers = args.centers[first : first + size]
        chunk_args = args._replace(centers=centers, sizes=(B, centers.shape[0], d, M))
        group_tiles, groups = grouped(centers.shape[0], max(B, 1), tile)
        yield Chunk(first, chunk_args, tile, group_tiles, groups, count)
        count += groups


def chunk_size(args: LaunchArgs, keep_scores: bool) -> int:
    """Return the number of classes per chunk."""
    if keep_scores:
        return args.sizes[1]
    return max(64, CHUNK_ELEMENTS // max(padded_rows(args.sizes[0]), 1) // 64 * 64)


def loss_grad_tile(args: LaunchArgs) -> tuple[int, int, int]:
    """Return the classes and rows of a tile of route_loss_grad_kernel, and its warps."""
    return args.tile_sizes.route_loss_grad if args.sizes[3] <= 32 else args.tile_sizes.route_loss_grad_many


def _contiguous(a: Loss) -> Loss:
    """Return the arguments with the loss's own tensors contiguous."""

    def contiguous(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.contiguous()

    return a._replace(
        target=a.target.contiguous(),
        class_bias=contiguous(a.class_bias),
        weight=contiguous(a.weight),
        margin=contiguous(a.margin),
    )


def forward(a: CrossEntropyForward) -> CrossEntropy:
    """Return the outputs of `cross_entropy_forward`."""
    args = LaunchArgs.of(a.input, a.centers, a.displacements, a.tau, a.allow_tf32)
    check_loss(a)
    a, keep = _contiguous(a), a.keep_scores
    B, K, _, M = args.sizes
    new, acc = args.input.new_empty, args.acc_dtype
    every = list(chunks(args, chunk_size(args, keep), args.tile_sizes.lse))
    shape = (max(c.args.sizes[1] for c in every), padded_rows(B))
    out = CrossEntropy(
        loss=new((B,) if a.reduction == 0 else (), dtype=acc),
        lse=new(B, dtype=acc),
        in_range=new(1, dtype=torch.bool),
        scores=new(shape, dtype=acc),
        slots=new(shape if keep else (0, 0), dtype=torch.uint8),
        center_rnorms=new(M, K, dtype=acc),
        input_rnorms=new(B, dtype=acc),
        rows=new(2 if a.margin is None else 5, B, dtype=acc),
        scalars=new(2, dtype=acc),
    )
    if B == 0:
        out.loss.fill_(torch.nan if a.reduction == 1 else 0.0)
        out.in_range.fill_(True)
        out.center_rnorms.zero_()
        out.scalars.zero_()
        return out
    groups = every[-1].first_group + every[-1].groups
    partials = Partials.allocate(args, groups, a.label_smoothing > 0)
    with on_device(args.input.device):
        shifts = new(M, B, dtype=acc)
        for c in every:
            classes = slice(c.first_class, c.first_class + c.args.sizes[1])
            rnorms = out.center_rnorms if c.groups == groups else new(M, c.args.sizes[1], dtype=acc)
            compute_norms(c.args, shifts, rnorms, out.input_rnorms if c.first_class == 0 else None)
            scores, slots = (out.scores, out.slots) if keep else (out.scores[: c.args.sizes[1]], None)
            _score(c, a, scores, slots, rnorms, out.input_rnorms, shifts, partials)
            if rnorms is not out.center_rnorms:
                out.center_rnorms[:, classes] = rnorms
        _reduce_loss(args, a, partials, out)
    return out if keep else out._replace(scores=new(0, 0, dtype=acc))


def _score(
    c: Chunk,
    a: Loss,
    scores: Tensor,
    slots: Tensor | None,
    rnorms: Tensor,
    input_rnorms: Tensor,
    shifts: Tensor,
    partials: Partials,
) -> None:
    """Compute a chunk's partials of the log-sum-exp, and its scores and slots unless slots is None."""
    args = c.args
    B, K, d, M = args.sizes
    chunk_classes = slice(c.first_class, c.first_class + K)
    multiply(args.centers, args.input.t(), scores[:, :B])
    sums = a.label_smoothing > 0
    options: dict[str, Any] = {
        "STASH": slots is not None, "HAS_BIAS": a.class_bias is not None,
        "HAS_WEIGHT": a.weight is not None and sums, "SUMS": sums, **args.constants("ACC"),
    }  # fmt: skip
    bias, weight = (None if x is None else x[chunk_classes] for x in (a.class_bias, a.weight))
    groups = partials.lse.shape[1]
    lse_kernel[(c.groups * tiles_of(B, c.tile[1]),)](
        scores, slots, rnorms, shifts, input_rnorms, args.tau, a.target, bias, weight, *partials,
        B, K, scores.shape[1], M, c.group_tiles, c.first_class, c.first_group, groups, a.ignore_index,
        BLOCK_C=c.tile[0], BLOCK_B=c.tile[1], UNROLLED_SLOTS=configs.unrolled_slots(M), num_warps=c.tile[2], **options,
    )  # fmt: skip
    if M > 1:
        classes, rows, dims = args.tile_sizes.rescore
        classes = min(classes, c.tile[0])
        rescore_cancelled_lse_kernel[(c.groups,)](
            args.input, args.centers, args.displacements, args.tau, input_rnorms, scores, slots, rnorms, a.target,
            bias, weight, partials.target_logits, partials.lse, B, K, d, scores.shape[1], M,
            c.group_tiles * (c.tile[0] // classes), c.first_class, c.first_group, groups, a.ignore_index,
            BLOCK_C=classes, BLOCK_B=rows, BLOCK_D=dims, **options,
        )  # fmt: skip


def _reduce_loss(args: LaunchArgs, a: Loss, partials: Partials, out: CrossEntropy) -> None:
    """Compute the loss, and what the backward needs of each row, from the partials."""
    B, K, _, _ = args.sizes
    rows, groups, elements = ROW_LOSS
    programs = tiles_of(B, rows)
    loss_partials = args.input.new_empty(3, programs, dtype=args.acc_dtype)
    row_loss_kernel[(programs,)](
        partials.lse, partials.class_sums, partials.target_logits, a.target, a.class_bias, a.weight, a.margin, args.tau,
        out.loss, out.lse, out.rows, loss_partials, out.scalars, B, K, partials.lse.shape[1], a.ignore_index,
        BLOCK_B=rows, BLOCK_G=groups,
        MARGIN=0 if a.margin is None else a.margin_kind + 1,
        MARGIN_EACH=a.margin is not None and a.margin.numel() > 1,
        SMOOTHING=a.label_smoothing, REDUCED=a.reduction > 0,
        HAS_BIAS=a.class_bias is not None, HAS_WEIGHT=a.weight is not None,
    )  # fmt: skip
    reduce_loss_kernel[(1,)](
        loss_partials, out.loss, out.scalars, out.in_range, programs,
        BLOCK=elements, REDUCED=a.reduction > 0, MEAN=a.reduction == 1,
    )  # fmt: skip


def backward(a: CrossEntropyBackward) -> CrossEntropyGradients:
    """Return the outputs of `cross_entropy_backward`."""
    args = LaunchArgs.of(a.input, a.centers, a.displacements, a.tau, a.allow_tf32)
    check_loss(a)
    check_saved_loss(a)
    a = _contiguous(a)._replace(
        scores=a.scores.contiguous(), slots=a.slots.contiguous(), center_rnorms=a.center_rnorms.contiguous(),
        input_rnorms=a.input_rnorms.contiguous(), rows=a.rows.contiguous(), scalars=a.scalars.contiguous(),
    )  # fmt: skip
    arguments = (a.input, a.centers, a.displacements, a.tau, a.class_bias, a.margin)
    needs = Needs(
        a.need_input, a.need_centers, a.need_displacements, a.need_tau,
        a.need_bias and a.class_bias is not None, a.need_margin and a.margin is not None,
    )  # fmt: skip
    if args.sizes[0] == 0 or not any(needs):
        return CrossEntropyGradients(
            *(
                torch.zeros_like(x) if x is not None and n else a.lse.new_empty(0)
                for x, n in zip(arguments, needs, strict=True)
            )
        )
    grad_loss, grad_lse = a.grad_loss, a.grad_lse
    routing: dict[str, Any] = {
        "grad_loss": grad_loss, "grad_stride": grad_loss.stride(0) if grad_loss is not None and grad_loss.dim() else 0,
        "grad_lse": grad_lse, "lse_stride": 0 if grad_lse is None else grad_lse.stride(0),
        "saved": a.rows, "scalars": a.scalars, "target": a.target, "class_bias": a.class_bias, "class_weight": a.weight,
        "num_classes": args.sizes[1], "ignore_index": a.ignore_index, "SMOOTHING": a.label_smoothing,
        "MEAN": a.reduction == 1, "HAS_LOSS": grad_loss is not None, "HAS_LSE": grad_lse is not None,
        "HAS_BIAS": a.class_bias is not None, "HAS_WEIGHT": a.weight is not None, "HAS_MARGIN": a.margin is not None,
    }  # fmt: skip
    with on_device(args.input.device):
        if a.scores.numel():
            (c,) = chunks(args, args.sizes[1], loss_grad_tile(args))
            saved = Saved(a.scores, a.scores, a.slots, a.center_rnorms, a.input_rnorms, True)
            computed = _gradients(c, saved, needs, routing, args.store_dtype)
        else:
            computed = _gradients_in_chunks(args, a, needs, routing)
    *others, grad_margin = computed
    if needs.margin and a.margin is not None and a.margin.numel() == 1:
        grad_margin = grad_margin.sum()
    return CrossEntropyGradients(
        *(
            like_argument(x, g) if needed and x is not None else a.lse.new_empty(0)
            for g, x, needed in zip((*others, grad_margin), arguments, needs, strict=True)
        )
    )


def _gradients(
    c: Chunk, saved: Saved, needs: Needs, routing: dict[str, Any], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Return all gradients of a chunk; those of input and displacements are in `dtype`."""
    if c.args.sizes[3] > 1:
        saved = saved._replace(grad=torch.empty_like(saved.logits))  # accessed for pairs that cancel only
    routed = _route(c, saved, needs, routing)
    empty = saved.logits.new_empty(0)
    grad_input = gradients.input_gradient(c.args, saved, routed, dtype) if needs.input else empty
    grad_centers, partials = gradients.centers_gradient(c.args, saved, routed, needs)
    grad_displacements = empty
    if needs.displacements:
        grad_displacements = gradients.displacements_gradient(c.args, routed, partials, dtype)
    return grad_input, grad_centers, grad_displacements, routed.grad_tau, routed.grad_bias, routed.grad_margin


def _route(c: Chunk, saved: Saved, needs: Needs, routing: dict[str, Any]) -> Routed:
    """Return H' and its sums, from scores."""
    B, K, _, M = c.args.sizes
    splits = tiles_of(B, c.tile[1])
    partials = RoutingPartials.allocate(c.args, needs, splits, c.groups)
    unrolled = c.args.tile_sizes.route_loss_grad_unrolled
    route_loss_grad_kernel[(splits * c.groups,)](
        saved.grad, saved.logits, saved.slots, saved.center_rnorms, saved.input_rnorms, c.args.tau, *partials,
        B=B, K=K, stride=saved.logits.shape[1], M=M, group_tiles=c.group_tiles, first_class=c.first_class,
        BLOCK_C=c.tile[0], BLOCK_B=c.tile[1], BLOCK_S=power_of_two(M),
        UNROLLED_SLOTS=configs.unrolled_slots(M) if unrolled else 0, num_warps=c.tile[2],
        MAX_WEIGHT=65504.0 if c.args.dtype == torch.float16 else 0.0, **partials.switches(), **routing,
    )  # fmt: skip
    return reduce_partials(c.args, partials, c.group_tiles * c.tile[0], c.tile[1])


def _gradients_in_chunks(
    args: LaunchArgs, a: CrossEntropyBackward, needs: Needs, routing: dict[str, Any]
) -> tuple[Tensor, ...]:
    """Return all gradients, from recomputed scores. Sums over chunks are accumulated in `args.acc_dtype`."""
    B, K, _, M = args.sizes
    new, acc = args.input.new_empty, args.acc_dtype
    shifts = new(M, B, dtype=acc)
    compute_norms(args, shifts, None, new(B, dtype=acc))
    size = min(chunk_size(args, False), K)
    scores, slots = new(size, padded_rows(B), dtype=acc), new(size, padded_rows(B), dtype=torch.uint8)
    sums: list[Tensor] = []
    for score, route in zip(
        chunks(args, size, args.tile_sizes.lse), chunks(args, size, loss_grad_tile(args)), strict=True
    ):
        count = score.args.sizes[1]
        classes = slice(score.first_class, score.first_class + count)
        z, winners = scores[:count], slots[:count]
        rnorms = a.center_rnorms[:, classes].contiguous()
        partials = Partials.allocate(args, score.groups, True)
        _score(score._replace(first_group=0), a, z, winners, rnorms, a.input_rnorms, shifts, partials)
        saved = Saved(z, z, winners, rnorms, a.input_rnorms, True)
        computed = _gradients(route, saved, needs, routing, acc)
        by_class = (1, 4, 5)  # the gradients of centers, bias and margin
        if not sums:
            sums = [
                x.new_empty(K, *x.shape[1:]) if i in by_class and x.numel() else torch.zeros_like(x)
                for i, x in enumerate(computed)
            ]
        for i, (total, more) in enumerate(zip(sums, computed, strict=True)):
            if i in by_class and more.numel():
                total[classes] = more
            elif more.numel():
                total += more
    return tuple(sums)
