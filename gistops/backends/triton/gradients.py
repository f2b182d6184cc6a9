"""The backward's kernels in order: route, then what each gradient asked for needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import configs
from .centers import centers_kernel
from .configs import Config, power_of_two
from .configs import tiles as tiles_of
from .finish import finish_displacements_kernel, finish_input_kernel
from .problem import Problem, product
from .route import route_kernel


class Needs(NamedTuple):
    """Which gradients are asked for."""

    input: bool
    centers: bool
    displacements: bool
    tau: bool


class Saved(NamedTuple):
    """The gradient of the logits, and what the forward returned; contiguous."""

    grad: Tensor  # [B, K]
    logits: Tensor  # [B, K]
    slots: Tensor  # [B, K]
    center_rnorms: Tensor  # [M, K]
    input_rnorms: Tensor  # [B]


class Routed(NamedTuple):
    """What route_kernel leaves, its parts summed. Empty where not needed."""

    weights: Tensor  # H' [B, stride]
    shares: Tensor  # S' [M, B]
    moments: Tensor  # U [M, K]
    total: Tensor  # Σ U
    flags: Tensor  # [splits, groups]: where pairs that cancel have won
    group_classes: int
    split_rows: int


def compute(p: Problem, saved: Saved, needs: Needs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients asked for, in the dtype of the problem or wider; others are empty."""
    routed = route(p, saved, needs)
    nothing = p.input.new_empty(0)
    of_input = input_gradient(p, saved, routed) if needs.input else nothing
    of_centers, parts = centers_gradient(p, saved, routed, needs)
    of_displacements = displacements_gradient(p, routed, parts) if needs.displacements else nothing
    of_tau = routed.total / p.tau.to(p.sums) if needs.tau else nothing
    return of_input, of_centers, of_displacements, of_tau


def route(p: Problem, saved: Saved, needs: Needs) -> Routed:
    """H' and its sums. The parts of sums are added by torch, whose sums have a fixed order."""
    B, K, _, M = p.sizes
    need_weights = needs.input or needs.centers
    need_shares = needs.input or needs.displacements
    need_moments = needs.centers or needs.displacements
    rows, classes = p.small.route if M <= 32 else p.small.route_many
    splits, class_tiles = tiles_of(B, rows), tiles_of(K, classes)
    wanted = min(class_tiles, configs.ROUTE_GROUPS, tiles_of(configs.ROUTE_PROGRAMS, splits))
    tiles = tiles_of(class_tiles, wanted)
    groups = tiles_of(class_tiles, tiles)
    stride = tiles_of(K, 16) * 16
    new = p.input.new_empty
    weights = new((B, stride) if need_weights else (0, 0), dtype=p.products)
    shares = new((groups, M, B) if need_shares else (0, M, B), dtype=p.sums)
    moments = new((splits, M, K) if need_moments else (0, M, K), dtype=p.sums)
    totals = new((splits, groups) if needs.tau else (0, 0), dtype=p.sums)
    flags = new(splits, groups, dtype=torch.int32)
    route_kernel[(splits * groups,)](
        saved.grad, saved.logits, saved.slots, saved.center_rnorms, saved.input_rnorms, p.tau,
        weights, shares, moments, totals, flags, B, K, stride, M, tiles,
        TILE_B=rows, TILE_K=classes, SLOTS=power_of_two(M),
        NEED_WEIGHTS=need_weights, NEED_SHARES=need_shares, NEED_MOMENTS=need_moments, NEED_TOTALS=needs.tau,
        LARGEST=65504.0 if p.dtype == torch.float16 else 0.0,
        num_warps=p.small.route_warps if M <= 32 else 4,
    )  # fmt: skip
    return Routed(weights, _sum(shares), _sum(moments), totals.sum(), flags, tiles * classes, rows)


def _sum(parts: Tensor) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def input_gradient(p: Problem, saved: Saved, routed: Routed) -> Tensor:
    """∂f, from the product H'W by torch's own library: no epilogue of ours would save it a pass over memory."""
    B, K, d, M = p.sizes
    weights = routed.weights[:, :K]
    products = product(weights, p.centers, p.sums)
    out = p.input.new_empty(B, d, dtype=p.products)
    classes, depth = p.small.finish_input
    finish_input_kernel[(B,)](
        products, routed.shares, p.input, p.centers, p.displacements, saved.grad, saved.slots,
        saved.center_rnorms, saved.input_rnorms, p.tau, routed.flags, out,
        B, K, d, M, routed.flags.shape[1], routed.group_classes, routed.split_rows,
        TILE_K=classes, TILE_D=min(depth, power_of_two(d)), **p.constants("ACC"),
    )  # fmt: skip
    return out


def centers_gradient(p: Problem, saved: Saved, routed: Routed, needs: Needs) -> tuple[Tensor, Tensor]:
    """∂w [K, d], and parts [class tiles, m, d] of ∂δ that sum over the classes; each empty where not needed."""
    B, K, d, M = p.sizes
    need_parts = needs.displacements and M > 1
    out = p.input.new_empty((K, d) if needs.centers else (0, d), dtype=p.products)
    parts = p.input.new_empty(0)
    if not needs.centers and not need_parts:
        return out, parts

    def launch(config: Config) -> Tensor:
        class_tiles = tiles_of(K, config.classes)
        parts = p.input.new_empty((class_tiles if need_parts else 0, M - 1, d), dtype=p.sums)
        centers_kernel[(class_tiles * tiles_of(d, config.depth),)](
            routed.weights, p.input, p.centers, p.displacements, saved.grad, saved.slots, saved.center_rnorms,
            routed.moments, saved.input_rnorms, p.tau, out, parts, B, K, d, routed.weights.shape[1], M,
            NEED_CENTERS=needs.centers, NEED_DISPLACEMENTS=need_parts,
            **p.constants("HALVES", "ACC", "PRECISION", "CORRECTION_PRECISION", "WIDEN"), **config.arguments(),
        )  # fmt: skip
        return parts

    return out, launch(configs.choose("centers", p.input.device, p.kind, B, K, d, M, launch))


def displacements_gradient(p: Problem, routed: Routed, parts: Tensor) -> Tensor:
    """∂δ [m, d]."""
    B, _, d, M = p.sizes
    out = p.input.new_empty(M - 1, d, dtype=p.products)
    if M > 1:
        rows, depth = p.small.finish_displacements
        finish_displacements_kernel[(tiles_of(d, depth), M - 1)](
            routed.shares, p.input, parts, out, B, d, M - 1, parts.shape[0],
            TILE_R=rows, TILE_D=depth, **p.constants("ACC"),
        )  # fmt: skip
    return out
