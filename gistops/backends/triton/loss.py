"""The launches of `cross_entropy_forward` and `cross_entropy_backward` of `torch.ops.gistops_triton`.

The forward takes five launches beside the product W f'. The backward takes four to six beside H'W and H'f, and up to two more
if it recomputes the scores. With `keep_scores` the forward keeps scores and slots, class-major, for the backward. Otherwise
both directions work in chunks of classes. Nothing here waits for the GPU.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from ...operators.cross_entropy import (
    CrossEntropy,
    CrossEntropyBackward,
    CrossEntropyForward,
    CrossEntropyGradients,
    padded_rows,
)
from . import loss_forms, loss_gradients
from .argument_checks import check_loss, check_saved_loss
from .configs import tiles as tiles_of
from .launch_args import LaunchArgs, on_device
from .logits import compute_norms, like_argument
from .loss_scores import Norms, Partials, chunk_size, chunks, score
from .routing import Needs
from .row_loss import reduce_loss_kernel, row_loss_kernel
from .tile_tables import ROW_LOSS

Loss = TypeVar("Loss", CrossEntropyForward, CrossEntropyBackward)


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
    args = loss_forms.launch_args(a)
    check_loss(a)
    a, keep = _contiguous(a), a.keep_scores
    B, K, _, M = args.sizes
    new, acc = args.input.new_empty, args.acc_dtype
    every = list(chunks(args, chunk_size(args, keep), args.tile_sizes.lse))
    shape = K if keep else every[0].args.sizes[1], padded_rows(B)
    subcenters = loss_forms.has_subcenters(args)
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
            if subcenters:
                rnorms = loss_forms.by_vector(args, out.center_rnorms)[classes]
            else:
                rnorms = out.center_rnorms if c.groups == groups else new(M, c.args.sizes[1], dtype=acc)
            vectors = loss_forms.as_classes(c.args)
            compute_norms(vectors, shifts, rnorms, out.input_rnorms if c.first_class == 0 else None)
            scores = out.scores[classes if keep else slice(c.args.sizes[1])]
            slots = out.slots[classes] if keep else None
            score(c, a, scores, slots, Norms(rnorms, out.input_rnorms, shifts), partials)
            if not subcenters and rnorms is not out.center_rnorms:
                out.center_rnorms[:, classes] = rnorms
        _reduce_loss(args, a, partials, out)
    return out if keep else out._replace(scores=new(0, 0, dtype=acc))


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
    args = loss_forms.launch_args(a)
    check_loss(a)
    check_saved_loss(a)
    a = _contiguous(a)._replace(
        scores=a.scores.contiguous(), slots=a.slots.contiguous(), center_rnorms=a.center_rnorms.contiguous(),
        input_rnorms=a.input_rnorms.contiguous(), rows=a.rows.contiguous(), scalars=a.scalars.contiguous(),
    )  # fmt: skip
    # The gradients of coefficients are in the dtype of the logits.
    coeffs = args.input_coeffs, args.class_coeffs
    arguments = (a.input, a.centers, a.displacements, a.tau, *coeffs, a.class_bias, a.margin)
    needs = Needs(
        a.need_input, a.need_centers, a.need_displacements, a.need_tau,
        a.need_bias and a.class_bias is not None, a.need_margin and a.margin is not None,
    )  # fmt: skip
    needed = (*needs[:4], *(x is not None for x in coeffs), *needs[4:])
    if args.sizes[0] == 0 or not any(needed):
        return CrossEntropyGradients._make(
            torch.zeros_like(x) if x is not None and n else a.lse.new_empty(0)
            for x, n in zip(arguments, needed, strict=True)
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
        if loss_forms.has_score_kernel(args):
            computed = loss_gradients.in_chunks_of_logits(args, a, needs, routing)
        elif a.scores.numel():
            computed = loss_gradients.from_scores(args, a, needs, routing)
        else:
            computed = loss_gradients.recomputed(args, a, needs, routing)
    *others, grad_margin = computed
    if needs.margin and a.margin is not None and a.margin.numel() == 1:
        grad_margin = grad_margin.sum()
    return CrossEntropyGradients._make(
        like_argument(x, g) if n and x is not None else a.lse.new_empty(0)
        for g, x, n in zip((*others, grad_margin), arguments, needed, strict=True)
    )
