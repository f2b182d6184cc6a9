"""`cross_entropy_forward` and `_backward` of `torch.ops.gistops_triton`: tensors in, kernels launched, tensors out.

A loss takes six launches beside the product W f', its gradients six beside the product HW. Scores and slots are held
for the backward (`keep`), class by class; otherwise both directions work in chunks of classes, and the backward makes
the scores again. Nothing waits for the GPU.
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
from . import configs, gradients, operators
from .cancellation_lse import rescore_cancelled_lse_kernel
from .configs import grouped, power_of_two
from .configs import tiles as tiles_of
from .launch_args import LaunchArgs, multiply, on_device
from .lse import lse_kernel
from .route_loss_grad import route_loss_grad_kernel
from .routing import Needs, Parts, Routed, Saved, reduce_partials
from .row_loss import reduce_loss_kernel, row_loss_kernel

Loss = TypeVar("Loss", CrossEntropyForward, CrossEntropyBackward)
CHUNK_ELEMENTS = 1 << 25  # scores in a chunk at most, where they are not held


class Chunk(NamedTuple):
    """Some classes: all, or as many as CHUNK_ELEMENTS allows."""

    first: int
    p: LaunchArgs
    tile: tuple[int, int, int]  # classes, features, warps
    run: int  # class tiles a group
    groups: int
    first_group: int


def chunks(p: LaunchArgs, size: int, tile: tuple[int, int, int]) -> Iterator[Chunk]:
    """The chunks of at most `size` classes."""
    B, K, d, M = p.sizes
    tile = tile[0], min(tile[1], power_of_two(max(B, 16))), tile[2]
    count = 0
    for first in range(0, K, size):
        centers = p.centers[first : first + size]
        part = p._replace(centers=centers, sizes=(B, centers.shape[0], d, M))
        run, groups = grouped(centers.shape[0], max(B, 1), tile)
        yield Chunk(first, part, tile, run, groups, count)
        count += groups


def chunk_size(p: LaunchArgs, held: bool) -> int:
    """Classes of a chunk."""
    return p.sizes[1] if held else max(64, CHUNK_ELEMENTS // max(padded_rows(p.sizes[0]), 1) // 64 * 64)


def loss_grad_tile(p: LaunchArgs) -> tuple[int, int, int]:
    """Classes and features of a tile of route_loss_grad_kernel, and its warps."""
    return p.small.route_loss_grad if p.sizes[3] <= 32 else p.small.route_loss_grad_many


def _contiguous(a: Loss) -> Loss:
    """Make the loss's own tensors contiguous."""

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
    a, keep = _contiguous(a), a.keep_scores
    p = LaunchArgs.of(a.input, a.centers, a.displacements, a.tau, a.allow_tf32)
    B, K, _, M = p.sizes
    new = p.input.new_empty
    lse, inside = new(B, dtype=p.sums), new(1, dtype=torch.bool)
    loss = new((B,) if a.reduction == 0 else (), dtype=p.sums)
    center_rnorms, input_rnorms = new(M, K, dtype=p.sums), new(B, dtype=p.sums)
    rows, scalars = new(2 if a.margin is None else 5, B, dtype=p.sums), new(2, dtype=p.sums)
    every = list(chunks(p, chunk_size(p, keep), p.small.lse))
    shape = (max(c.p.sizes[1] for c in every), padded_rows(B))
    scores, slots = new(shape, dtype=p.sums), new(shape if keep else (0, 0), dtype=torch.uint8)
    if B == 0:
        loss.fill_(torch.nan if a.reduction == 1 else 0.0)
        inside.fill_(True)
        center_rnorms.zero_()
        scalars.zero_()
        return CrossEntropy(loss, lse, inside, scores, slots, center_rnorms, input_rnorms, rows, scalars)
    groups = every[-1].first_group + every[-1].groups
    target_logits = new(B, dtype=p.sums)
    partials = new(2 + (a.label_smoothing > 0), groups, B, dtype=p.sums)
    class_sums = new(2, groups, dtype=p.sums)
    with on_device(p.input.device):
        shifts = new(M, B, dtype=p.sums)
        for c in every:
            rnorms = center_rnorms if c.groups == groups else new(M, c.p.sizes[1], dtype=p.sums)
            operators.compute_norms(c.p, shifts, rnorms, input_rnorms if c.first == 0 else None)
            z, slot = (scores, slots) if keep else (scores[: c.p.sizes[1]], None)
            _score(c, a, z, slot, rnorms, input_rnorms, shifts, target_logits, partials, class_sums, groups)
            if rnorms is not center_rnorms:
                center_rnorms[:, c.first : c.first + c.p.sizes[1]] = rnorms
        _finish(p, a, partials, class_sums, target_logits, loss, lse, inside, rows, scalars)
    if not keep:
        scores = scores.new_empty(0, 0)
    return CrossEntropy(loss, lse, inside, scores, slots, center_rnorms, input_rnorms, rows, scalars)


def _score(
    c: Chunk,
    a: Loss,
    scores: Tensor,
    slots: Tensor | None,
    rnorms: Tensor,
    input_rnorms: Tensor,
    shifts: Tensor,
    target_logits: Tensor,
    partials: Tensor,
    class_sums: Tensor,
    groups: int,
) -> None:
    """A chunk's part of the log-sum-exp; its scores and slots too, unless slots is None."""
    p = c.p
    B, K, d, M = p.sizes
    part = slice(c.first, c.first + K)
    multiply(p.centers, p.input.t(), scores[:, :B])
    sums = a.label_smoothing > 0
    options: dict[str, Any] = {
        "STASH": slots is not None, "HAS_BIAS": a.class_bias is not None,
        "HAS_WEIGHT": a.weight is not None and sums, "SUMS": sums, **p.constants("ACC"),
    }  # fmt: skip
    bias, weight = (None if x is None else x[part] for x in (a.class_bias, a.weight))
    lse_kernel[(c.groups * tiles_of(B, c.tile[1]),)](
        scores, slots, rnorms, shifts, input_rnorms, p.tau, a.target, bias, weight, target_logits, partials,
        class_sums, B, K, scores.shape[1], M, c.run, c.first, c.first_group, groups, a.ignore_index,
        BLOCK_C=c.tile[0], BLOCK_B=c.tile[1], UNROLLED_SLOTS=configs.unrolled_slots(M), num_warps=c.tile[2], **options,
    )  # fmt: skip
    if M > 1:
        classes, rows, dims = p.small.rescore
        classes = min(classes, c.tile[0])
        rescore_cancelled_lse_kernel[(c.groups,)](
            p.input, p.centers, p.displacements, p.tau, input_rnorms, scores, slots, rnorms, a.target, bias, weight,
            target_logits, partials, B, K, d, scores.shape[1], M, c.run * (c.tile[0] // classes), c.first,
            c.first_group, groups, a.ignore_index, BLOCK_C=classes, BLOCK_B=rows, BLOCK_D=dims, **options,
        )  # fmt: skip


def _finish(
    p: LaunchArgs,
    a: Loss,
    partials: Tensor,
    class_sums: Tensor,
    target_logits: Tensor,
    loss: Tensor,
    lse: Tensor,
    inside: Tensor,
    rows: Tensor,
    scalars: Tensor,
) -> None:
    """The loss, from the groups' parts."""
    B, K, _, _ = p.sizes
    height, run, long = configs.ROW_LOSS
    programs = tiles_of(B, height)
    parts = p.input.new_empty(3, programs, dtype=p.sums)
    row_loss_kernel[(programs,)](
        partials, class_sums, target_logits, a.target, a.class_bias, a.weight, a.margin, p.tau,
        loss, lse, rows, parts, scalars, B, K, partials.shape[1], a.ignore_index, BLOCK_R=height, BLOCK_T=run,
        MARGIN=0 if a.margin is None else a.margin_kind + 1,
        MARGIN_EACH=a.margin is not None and a.margin.numel() > 1,
        SMOOTHING=a.label_smoothing, REDUCED=a.reduction > 0,
        HAS_BIAS=a.class_bias is not None, HAS_WEIGHT=a.weight is not None,
    )  # fmt: skip
    reduce_loss_kernel[(1,)](
        parts, loss, scalars, inside, programs, BLOCK=long, REDUCED=a.reduction > 0, MEAN=a.reduction == 1
    )


def backward(a: CrossEntropyBackward) -> CrossEntropyGradients:
    """Return the outputs of `cross_entropy_backward`."""
    a = _contiguous(a)
    p = LaunchArgs.of(a.input, a.centers, a.displacements, a.tau, a.allow_tf32)
    arguments = (a.input, a.centers, a.displacements, a.tau, a.class_bias, a.margin)
    needs = Needs(
        a.need_input, a.need_centers, a.need_displacements, a.need_tau,
        a.need_bias and a.class_bias is not None, a.need_margin and a.margin is not None,
    )  # fmt: skip
    if p.sizes[0] == 0 or not any(needs):
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
        "every_class": p.sizes[1], "ignore_index": a.ignore_index, "SMOOTHING": a.label_smoothing,
        "MEAN": a.reduction == 1, "HAS_LOSS": grad_loss is not None, "HAS_LSE": grad_lse is not None,
        "HAS_BIAS": a.class_bias is not None, "HAS_WEIGHT": a.weight is not None, "HAS_MARGIN": a.margin is not None,
    }  # fmt: skip
    with on_device(p.input.device):
        if a.scores.numel():
            (c,) = chunks(p, p.sizes[1], loss_grad_tile(p))
            saved = Saved(a.scores, a.scores, a.slots, a.center_rnorms, a.input_rnorms, True)
            made = _gradients(c, saved, needs, routing, p.products)
        else:
            made = _in_chunks(p, a, needs, routing, a.center_rnorms, a.input_rnorms)
    *others, of_margin = made
    if needs.margin and a.margin is not None and a.margin.numel() == 1:
        of_margin = of_margin.sum()
    return CrossEntropyGradients(
        *(
            operators._like(x, g) if needed and x is not None else a.lse.new_empty(0)
            for g, x, needed in zip((*others, of_margin), arguments, needs, strict=True)
        )
    )


def _gradients(
    c: Chunk, saved: Saved, needs: Needs, routing: dict[str, Any], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """All gradients of a chunk, of input and displacements in the dtype given."""
    if c.p.sizes[3] > 1:
        saved = saved._replace(grad=torch.empty_like(saved.logits))  # touched only where pairs cancel
    routed = _route(c, saved, needs, routing)
    none = saved.logits.new_empty(0)
    of_input = gradients.input_gradient(c.p, saved, routed, dtype) if needs.input else none
    of_centers, parts = gradients.centers_gradient(c.p, saved, routed, needs)
    of_displacements = none
    if needs.displacements:
        of_displacements = gradients.displacements_gradient(c.p, routed, parts, dtype)
    return of_input, of_centers, of_displacements, routed.of_tau, routed.of_bias, routed.of_margin


def _route(c: Chunk, saved: Saved, needs: Needs, routing: dict[str, Any]) -> Routed:
    """H' and its sums, from scores."""
    B, K, _, M = c.p.sizes
    splits = tiles_of(B, c.tile[1])
    parts = Parts.of(c.p, needs, splits, c.groups)
    route_loss_grad_kernel[(splits * c.groups,)](
        saved.grad, saved.logits, saved.slots, saved.center_rnorms, saved.input_rnorms, c.p.tau, *parts,
        B=B, K=K, stride=saved.logits.shape[1], M=M, run=c.run, first=c.first,
        BLOCK_C=c.tile[0], BLOCK_B=c.tile[1], BLOCK_S=power_of_two(M),
        UNROLLED_SLOTS=configs.unrolled_slots(M) if c.p.small.route_loss_grad_unrolled else 0, num_warps=c.tile[2],
        MAX_WEIGHT=65504.0 if c.p.dtype == torch.float16 else 0.0, **parts.switches(), **routing,
    )  # fmt: skip
    return reduce_partials(c.p, parts, c.run * c.tile[0], c.tile[1])


def _in_chunks(
    p: LaunchArgs,
    a: Loss,
    needs: Needs,
    routing: dict[str, Any],
    center_rnorms: Tensor,
    input_rnorms: Tensor,
) -> tuple[Tensor, ...]:
    """As `_gradients`, from scores made again; what is summed over chunks is summed in `p.sums`."""
    B, K, _, M = p.sizes
    new = p.input.new_empty
    shifts = new(M, B, dtype=p.sums)
    operators.compute_norms(p, shifts, None, new(B, dtype=p.sums))
    size = min(chunk_size(p, False), K)
    memory, slots = new(size, padded_rows(B), dtype=p.sums), new(size, padded_rows(B), dtype=torch.uint8)
    target_logits = new(B, dtype=p.sums)
    sums: list[Tensor] = []
    for score, route in zip(chunks(p, size, p.small.lse), chunks(p, size, loss_grad_tile(p)), strict=True):
        classes = score.p.sizes[1]
        part = slice(score.first, score.first + classes)
        rnorms = center_rnorms[:, part].contiguous()
        partials, class_sums = new(3, score.groups, B, dtype=p.sums), new(2, score.groups, dtype=p.sums)
        parked = memory[:classes], slots[:classes]
        alone = score._replace(first_group=0)
        _score(
            alone,
            a,
            *parked,
            rnorms,
            input_rnorms,
            shifts,
            target_logits,
            partials,
            class_sums,
            score.groups,
        )
        saved = Saved(parked[0], *parked, rnorms, input_rnorms, True)
        some = _gradients(route, saved, needs, routing, p.sums)
        if not sums:
            sums = [
                x.new_empty(K, *x.shape[1:]) if i in (1, 4, 5) and x.numel() else torch.zeros_like(x)
                for i, x in enumerate(some)
            ]
        for i, (total, more) in enumerate(zip(sums, some, strict=True)):
            if i in (1, 4, 5) and more.numel():
                total[part] = more
            elif more.numel():
                total += more
    return tuple(sums)
