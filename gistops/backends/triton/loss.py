"""`gistops::triton_cross_entropy_forward` and `_backward`: a loss in six launches, and its gradients in six.

The forward holds scores and slots for the backward (`keep`), five bytes a pair, or no score at all: then the backward
makes them again in chunks of classes. Nothing waits for the GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import configs, gradients, operators
from .apart_lse import apart_lse_kernel
from .configs import FUSED_SLOTS, Config
from .forward import forward_kernel, norms_kernel
from .gradients import Needs, Saved
from .prepare import prepare_kernel
from .problem import Problem, on_device
from .routing import route
from .rows import rows_kernel, total_kernel

#: Scores in a chunk of a backward that makes them again, at most.
CHUNK_ELEMENTS = 1 << 25
MARGINS = {"logit": 1, "cosine": 2, "angle": 3}


def forward(
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor,
    class_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    margin: Tensor | None,
    margin_kind: str,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    keep: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor, ...]:
    """loss, lse [B], and for the backward scores, slots, center_rnorms, input_rnorms, rows, scalars."""
    p = Problem.of(input, centers, displacements, tau, allow_tf32)
    B, K, d, M = p.sizes
    class_bias, weight, margin, target = (
        x if x is None else x.contiguous() for x in (class_bias, weight, margin, target)
    )
    assert target is not None
    new = p.input.new_empty
    scores = new((B, K) if keep else (0, 0), dtype=p.sums)
    slots = new((B, K) if keep else (0, 0), dtype=torch.uint8)
    center_rnorms, input_rnorms = new(M, K, dtype=p.sums), new(B, dtype=p.sums)
    rows, scalars = new(5 if margin is not None else 2, B, dtype=p.sums), new(2, dtype=p.sums)
    lse = new(B, dtype=p.sums)
    loss = new((B,) if reduction == "none" else (), dtype=p.sums)
    made = loss, lse, scores, slots, center_rnorms, input_rnorms, rows, scalars
    if B == 0:
        loss.fill_(torch.nan if reduction == "mean" else 0.0)
        center_rnorms.zero_()
        scalars.zero_()
        return made
    switches = {
        "HAS_BIAS": class_bias is not None,
        "HAS_WEIGHT": weight is not None and label_smoothing > 0,
        "SUMS": label_smoothing > 0,
    }
    target_logits = new(B, dtype=p.sums)

    def launch(config: Config) -> tuple[Tensor, Tensor]:
        tiles = -(-K // config.classes)
        partials, class_sums = new(2 + (label_smoothing > 0), tiles, B, dtype=p.sums), new(2, tiles, dtype=p.sums)
        forward_kernel[(tiles * -(-B // config.features),)](
            p.input, p.centers, p.displacements, p.tau, input_rnorms, shifts, squares, scores, slots, center_rnorms,
            target, class_bias, weight, target_logits, partials, class_sums, B, K, d, M, tiles, ignore_index,
            LSE=True, PARK=keep, SLOTS=1 if M == 1 else FUSED_SLOTS if M <= FUSED_SLOTS else 0, **switches,
            **p.constants("ACC", "PRECISION", "NORM_PRECISION", "WIDEN"), **config.arguments(),
        )  # fmt: skip
        return partials, class_sums

    with on_device(p.input.device):
        shifts, squares = _prepare(p, input_rnorms, center_rnorms)
        config = configs.choose("forward", p.input.device, p.kind, B, K, d, M, launch)
        partials, class_sums = launch(config)
        tiles = partials.shape[1]
        if M > 1:
            classes, height, depth = p.small.apart
            apart_lse_kernel[(tiles,)](
                p.input, p.centers, p.displacements, p.tau, input_rnorms, scores, slots, center_rnorms,
                target, class_bias, weight, target_logits, partials, B, K, d, M, tiles, ignore_index,
                CLASSES=config.classes, TILE_K=min(classes, config.classes), TILE_B=height, TILE_D=depth,
                PARK=keep, **switches, **p.constants("ACC"),
            )  # fmt: skip
        height, run, long = configs.ROWS
        programs = -(-B // height)
        parts, good = new(3, programs, dtype=p.sums), new(1, dtype=torch.bool)
        rows_kernel[(programs,)](
            partials, class_sums, target_logits, target, class_bias, weight, margin, p.tau,
            loss, lse, rows, parts, scalars, B, K, tiles, ignore_index, TILE_R=height, TILE_T=run,
            MARGIN=0 if margin is None else MARGINS[margin_kind],
            MARGIN_EACH=margin is not None and margin.numel() > 1,
            SMOOTHING=label_smoothing, REDUCED=reduction != "none",
            HAS_BIAS=class_bias is not None, HAS_WEIGHT=weight is not None,
        )  # fmt: skip
        total_kernel[(1,)](
            parts, loss, scalars, good, programs, TILE=long,
            REDUCED=reduction != "none", MEAN=reduction == "mean",
        )  # fmt: skip
        torch._assert_async(good, f"target: expected 0 to {K - 1} or ignore_index {ignore_index}")
    return made


def _prepare(p: Problem, input_rnorms: Tensor, center_rnorms: Tensor) -> tuple[Tensor, Tensor]:
    """f·δ [M, B] and |δ|² [M]; the features' norms, and the centres' if there are too many for the forward."""
    B, K, d, M = p.sizes
    shifts = p.input.new_empty(M, B, dtype=p.sums)
    squares = p.input.new_empty(M, dtype=p.sums)
    rows, depth = p.small.prepare
    prepare_kernel[(-(-B // rows), -(-M // 16))](
        p.input, p.displacements, input_rnorms, shifts, squares, B, d, M,
        TILE_B=rows, TILE_D=depth, SLOTS=16, PRECISION=p.constants("NORM_PRECISION")["NORM_PRECISION"],
        **p.constants("ACC", "WIDEN"),
    )  # fmt: skip
    if M > FUSED_SLOTS:
        classes, depth = p.small.norms
        norms_kernel[(-(-K // classes), -(-M // 16))](
            p.centers, p.displacements, squares, center_rnorms, K, d, M,
            TILE_K=classes, TILE_D=depth, SLOTS=16, **p.constants("ACC", "NORM_PRECISION", "WIDEN"),
        )  # fmt: skip
    return shifts, squares


def backward(
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor,
    class_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    margin: Tensor | None,
    scores: Tensor,
    slots: Tensor,
    center_rnorms: Tensor,
    input_rnorms: Tensor,
    rows: Tensor,
    scalars: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    need_input: bool,
    need_centers: bool,
    need_displacements: bool,
    need_tau: bool,
    need_bias: bool,
    need_margin: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, centers, displacements, tau, class_bias and margin, each empty where not needed."""
    p = Problem.of(input, centers, displacements, tau, allow_tf32)
    B, K, _, M = p.sizes
    arguments = (input, centers, displacements, tau, class_bias, margin)
    needs = Needs(
        need_input, need_centers, need_displacements, need_tau,
        need_bias and class_bias is not None, need_margin and margin is not None,
    )  # fmt: skip
    none = scalars.new_empty(0)
    if B == 0 or not any(needs):
        made = [torch.zeros_like(x) if x is not None and n else none for x, n in zip(arguments, needs, strict=True)]
        return made[0], made[1], made[2], made[3], made[4], made[5]
    class_bias, weight, target = (x if x is None else x.contiguous() for x in (class_bias, weight, target))
    of_loss: dict[str, Any] = {
        "grad_loss": grad_loss, "grad_stride": grad_loss.stride(0) if grad_loss is not None and grad_loss.dim() else 0,
        "grad_lse": grad_lse, "lse_stride": 0 if grad_lse is None else grad_lse.stride(0),
        "saved": rows, "scalars": scalars, "target": target, "class_bias": class_bias, "class_weight": weight,
        "every_class": K, "ignore_index": ignore_index,
        "SOFTMAX": True, "SMOOTHING": label_smoothing, "MEAN": reduction == "mean",
        "HAS_LOSS": grad_loss is not None, "HAS_LSE": grad_lse is not None,
        "HAS_BIAS": class_bias is not None, "HAS_WEIGHT": weight is not None, "HAS_MARGIN": margin is not None,
    }  # fmt: skip
    with on_device(p.input.device):
        if scores.numel():
            made = _gradients(p, Saved(scores, scores, slots, center_rnorms, input_rnorms), needs, of_loss, 0, p.products)
        else:
            made = _in_chunks(p, needs, of_loss, allow_tf32)
    *made, of_margin = made
    if needs.margin and margin is not None and margin.numel() == 1:
        of_margin = of_margin.sum()
    of = [
        operators._like(x, g) if needed and x is not None else none
        for g, x, needed in zip((*made, of_margin), arguments, needs, strict=True)
    ]
    return of[0], of[1], of[2], of[3], of[4], of[5]


def _gradients(
    p: Problem, saved: Saved, needs: Needs, of_loss: dict[str, Any], first: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """All gradients of some classes, of input and displacements in the dtype given."""
    if p.sizes[3] > 1:
        saved = replace(saved, grad=torch.empty_like(saved.logits))  # touched only where pairs cancel
    routed = route(p, saved, needs, of_loss | {"first": first})
    none = saved.logits.new_empty(0)
    of_input = gradients.input_gradient(p, saved, routed, dtype) if needs.input else none
    of_centers, parts = gradients.centers_gradient(p, saved, routed, needs)
    of_displacements = gradients.displacements_gradient(p, routed, parts, dtype) if needs.displacements else none
    return of_input, of_centers, of_displacements, routed.of_tau, routed.of_bias, routed.of_margin


def _in_chunks(p: Problem, needs: Needs, of_loss: dict[str, Any], allow_tf32: bool) -> tuple[Tensor, ...]:
    """As `_gradients`, from scores made again; what is summed over chunks of classes is summed in `p.sums`."""
    B, K, _, _ = p.sizes
    size = max(64, CHUNK_ELEMENTS // B // 64 * 64)
    sums: list[Tensor] = []
    for first in range(0, K, size):
        chunk = replace(p, centers=p.centers[first : first + size])
        made = operators.forward(chunk.input, chunk.centers, chunk.displacements, chunk.tau, allow_tf32)
        some = _gradients(chunk, Saved(made[0], *made), needs, of_loss, first, p.sums)
        if not sums:
            sums = [
                x.new_empty(K, *x.shape[1:]) if i in (1, 4, 5) and x.numel() else torch.zeros_like(x)
                for i, x in enumerate(some)
            ]
        for i, (total, more) in enumerate(zip(sums, some, strict=True)):
            if i in (1, 4, 5) and more.numel():
                total[first : first + size] = more
            elif more.numel():
                total += more
    return tuple(sums)
