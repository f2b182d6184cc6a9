"""The launches of route_kernel and gather_kernel, for the gradient of logits and for that of a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import configs
from .gather import gather_kernel
from .problem import Problem
from .route import route_kernel


class Needs(NamedTuple):
    """Which gradients are asked for."""

    input: bool
    centers: bool
    displacements: bool
    tau: bool
    bias: bool = False
    margin: bool = False


@dataclass(frozen=True)
class Saved:
    """The gradient of the logits, and what the forward returned; contiguous."""

    grad: Tensor  # [B, K]; for a loss, memory for what of it belongs to pairs that cancel
    logits: Tensor  # [B, K]
    slots: Tensor  # [B, K]
    center_rnorms: Tensor  # [M, K]
    input_rnorms: Tensor  # [B]


@dataclass(frozen=True)
class Routed:
    """What route_kernel leaves, its parts summed. Empty where not needed."""

    weights: Tensor  # H' [B, stride]
    shares: Tensor  # S' [M, B]
    moments: Tensor  # U [M, K]
    of_tau: Tensor  # one element
    of_bias: Tensor  # [K]
    of_margin: Tensor  # [K]
    flags: Tensor  # [splits, groups]: where pairs that cancel have won
    group_classes: int
    split_rows: int


#: What route_kernel takes beyond logits, for the gradient of logits.
PLAIN: dict[str, Any] = dict.fromkeys(
    ("grad_loss", "grad_lse", "saved", "scalars", "target", "class_bias", "class_weight")
) | dict.fromkeys(("grad_stride", "lse_stride", "first", "every_class", "ignore_index"), 0)
PLAIN |= {"SOFTMAX": False, "SMOOTHING": 0.0} | dict.fromkeys(
    ("MEAN", "HAS_LOSS", "HAS_LSE", "HAS_BIAS", "HAS_WEIGHT", "HAS_MARGIN"), False
)


def route(p: Problem, saved: Saved, needs: Needs, loss: dict[str, Any] | None = None) -> Routed:
    """H' and its sums; `loss`: arguments of route_kernel that make it take scores for logits."""
    B, K, _, M = p.sizes
    need_weights = needs.input or needs.centers
    need_shares = needs.input or needs.displacements
    need_moments = needs.centers or needs.displacements
    rows, classes = p.small.route if M <= 32 else p.small.route_many
    splits, class_tiles = -(-B // rows), -(-K // classes)
    wanted = min(class_tiles, configs.ROUTE_GROUPS, -(-configs.ROUTE_PROGRAMS // splits))
    tiles = -(-class_tiles // wanted)
    groups = -(-class_tiles // tiles)
    stride = -(-K // 16) * 16
    new = p.input.new_empty
    weights = new((B, stride) if need_weights else (0, 0), dtype=p.products)
    shares = new((groups, M, B) if need_shares else (0, M, B), dtype=p.sums)
    moments = new((splits, M, K) if need_moments else (0, M, K), dtype=p.sums)
    totals = new((splits, groups) if needs.tau else (0, 0), dtype=p.sums)
    bias_parts = new((splits, K) if needs.bias else (0, K), dtype=p.sums)
    margin_parts = new((splits, K) if needs.margin else (0, K), dtype=p.sums)
    flags = new(splits, groups, dtype=torch.int32)
    route_kernel[(splits * groups,)](
        saved.grad, saved.logits, saved.slots, saved.center_rnorms, saved.input_rnorms, p.tau,
        weights, shares, moments, totals, flags,
        bias_parts=bias_parts, margin_parts=margin_parts, B=B, K=K, stride=stride, M=M, tiles=tiles,
        TILE_B=rows, TILE_K=classes, SLOTS=1 << (M - 1).bit_length(),
        NEED_WEIGHTS=need_weights, NEED_SHARES=need_shares, NEED_MOMENTS=need_moments, NEED_TOTALS=needs.tau,
        NEED_BIAS=needs.bias, NEED_MARGIN=needs.margin,
        LARGEST=65504.0 if p.dtype == torch.float16 else 0.0,
        num_warps=p.small.route_warps if M <= 32 else 4, **(loss or PLAIN),
    )  # fmt: skip
    summed = _gather(p, (shares, moments, bias_parts, margin_parts), totals)
    return Routed(weights, *summed, flags, tiles * classes, rows)


def _gather(
    p: Problem, parts: tuple[Tensor, Tensor, Tensor, Tensor], totals: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sums over the first dimension in the order of Routed; one part is its own sum."""
    due = [x.shape[0] > 1 for x in parts]
    sums = [
        x.new_empty(x.shape[1:]) if more else x.view(x.shape[1:]) if x.numel() else x
        for x, more in zip(parts, due, strict=True)
    ]
    lengths = [x[0].numel() if more else 0 for x, more in zip(parts, due, strict=True)]
    of_tau = totals.new_empty(1 if totals.numel() else 0)
    rows, columns, run = configs.GATHER
    programs = sum(-(-length // columns) for length in lengths) + of_tau.numel()
    if programs:
        shares, moments, bias, margin = parts
        gather_kernel[(programs,)](
            shares, moments, bias, margin, totals, p.tau, *sums, of_tau, shares.shape[0],
            max(x.shape[0] for x in (moments, bias, margin)), *lengths, totals.numel(),
            TILE_P=rows, TILE_N=columns, TILE_T=run,
        )  # fmt: skip
    return sums[0], sums[1], of_tau, sums[2], sums[3]
