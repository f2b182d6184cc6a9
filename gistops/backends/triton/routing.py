"""The launches of route_logits_grad_kernel and reduce_partials_kernel, for the gradient of logits and for that of a loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...operators.cross_entropy import padded_rows
from . import configs
from .configs import power_of_two
from .configs import tiles as tiles_of
from .launch_args import LaunchArgs
from .reduce_partials import reduce_partials_kernel
from .route_logits_grad import route_logits_grad_kernel


class Needs(NamedTuple):
    """The gradients that are asked for."""

    input: bool
    centers: bool
    displacements: bool
    tau: bool
    bias: bool = False
    margin: bool = False


class Saved(NamedTuple):
    """The gradient of the logits, and what the forward returned; contiguous.

    grad, logits and slots are [B, K], or for a loss [K, ldB]. There grad is memory for what of it belongs to pairs that
    cancel.
    """

    grad: Tensor
    logits: Tensor
    slots: Tensor
    center_rnorms: Tensor  # [M, K]
    input_rnorms: Tensor  # [B]
    by_class: bool = False

    @property
    def strides(self) -> tuple[int, int]:
        """Of grad and slots: from one row to the next, and from one class to the next."""
        length = self.slots.stride(0)
        return (1, length) if self.by_class else (length, 1)


class Routed(NamedTuple):
    """The results of route_logits_grad_kernel, their parts summed. Empty where not needed."""

    weights: Tensor  # H' [K, ldB]
    shares: Tensor  # S' [M, B]
    moments: Tensor  # U [M, K]
    of_tau: Tensor  # one element
    of_bias: Tensor  # [K]
    of_margin: Tensor  # [K]
    flags: Tensor  # [splits, groups]: where pairs that cancel have won
    group_classes: int
    split_rows: int


class Parts(NamedTuple):
    """Memory for what a routing kernel leaves: sums over tiles of classes (groups) or of features (splits)."""

    weights: Tensor  # H' [K, ldB]
    shares: Tensor  # [groups, M, B]
    moments: Tensor  # [splits, M, K]
    totals: Tensor  # [splits, groups]
    bias: Tensor  # [splits, K]
    margin: Tensor  # [splits, K]
    flags: Tensor  # [splits, groups]

    @classmethod
    def of(cls, p: LaunchArgs, needs: Needs, splits: int, groups: int) -> Parts:
        B, K, _, M = p.sizes
        new, sums = p.input.new_empty, p.sums
        return cls(
            new((K, padded_rows(B)) if needs.input or needs.centers else (0, 0), dtype=p.products),
            new((groups if needs.input or needs.displacements else 0, M, B), dtype=sums),
            new((splits if needs.centers or needs.displacements else 0, M, K), dtype=sums),
            new((splits, groups) if needs.tau else (0, 0), dtype=sums),
            new((splits if needs.bias else 0, K), dtype=sums),
            new((splits if needs.margin else 0, K), dtype=sums),
            new(splits, groups, dtype=torch.int32),
        )

    def switches(self) -> dict[str, bool]:
        """Those of them that the kernel is to fill."""
        return {
            f"NEED_{name.upper()}": x.numel() > 0 for name, x in zip(self._fields[:6], self, strict=False)
        }


def route(p: LaunchArgs, saved: Saved, needs: Needs) -> Routed:
    """H' and its sums, from the gradient of the logits."""
    B, K, _, M = p.sizes
    rows, classes, warps = p.small.route_logits_grad if M <= 32 else p.small.route_logits_grad_many
    splits, class_tiles = tiles_of(B, rows), tiles_of(K, classes)
    wanted = min(class_tiles, configs.ROUTE_GROUPS, tiles_of(configs.ROUTE_PROGRAMS, splits))
    tiles = tiles_of(class_tiles, wanted)
    groups = tiles_of(class_tiles, tiles)
    parts = Parts.of(p, needs, splits, groups)
    switches = parts.switches()
    del switches["NEED_BIAS"], switches["NEED_MARGIN"]
    route_logits_grad_kernel[(splits * groups,)](
        saved.grad, saved.logits, saved.slots, saved.center_rnorms, saved.input_rnorms, p.tau,
        *parts[:4], parts.flags, B, K, padded_rows(B), M, tiles, BLOCK_B=rows, BLOCK_C=classes, BLOCK_S=power_of_two(M), UNROLLED_SLOTS=configs.unrolled_slots(M),
        MAX_WEIGHT=65504.0 if p.dtype == torch.float16 else 0.0,
        num_warps=warps, **switches,
    )  # fmt: skip
    return reduce_partials(p, parts, tiles * classes, rows)


def reduce_partials(p: LaunchArgs, parts: Parts, group_classes: int, split_rows: int) -> Routed:
    """The sums over the first dimension; one part is its own sum."""
    several = parts.shares, parts.moments, parts.bias, parts.margin
    due = [x.shape[0] > 1 for x in several]
    sums = [
        x.new_empty(x.shape[1:]) if more else x.view(x.shape[1:]) if x.numel() else x
        for x, more in zip(several, due, strict=True)
    ]
    lengths = [x[0].numel() if more else 0 for x, more in zip(several, due, strict=True)]
    of_tau = parts.totals.new_empty(1 if parts.totals.numel() else 0)
    rows, columns, run = configs.REDUCE
    programs = sum(tiles_of(length, columns) for length in lengths) + of_tau.numel()
    if programs:
        reduce_partials_kernel[(programs,)](
            *several, parts.totals, p.tau, *sums, of_tau, parts.flags.shape[1], parts.flags.shape[0],
            *lengths, parts.totals.numel(), BLOCK_P=rows, BLOCK_N=columns, BLOCK_T=run,
        )  # fmt: skip
    return Routed(
        parts.weights, sums[0], sums[1], of_tau, sums[2], sums[3], parts.flags, group_classes, split_rows
    )
