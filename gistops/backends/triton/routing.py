"""The launches that route a gradient to the winning slots, and the records that they read and return."""

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
from .tile_tables import REDUCE


class Needs(NamedTuple):
    """The gradients to compute."""

    input: bool
    centers: bool
    displacements: bool
    tau: bool
    bias: bool = False
    margin: bool = False


class Saved(NamedTuple):
    """The gradient of the logits, and the forward's results; contiguous.

    grad, logits and slots are [B, K], or class-major [K, ldB] for a loss. There grad holds only what belongs to pairs
    that cancel.
    """

    grad: Tensor
    logits: Tensor
    slots: Tensor
    center_rnorms: Tensor  # [M, K]; of sub-centers [K, M]
    input_rnorms: Tensor  # [B]
    class_major: bool = False

    @property
    def strides(self) -> tuple[int, int]:
        """The strides of grad and slots between rows and between classes."""
        length = self.slots.stride(0)
        return (1, length) if self.class_major else (length, 1)


class Routed(NamedTuple):
    """The routed gradient, its partials reduced. Tensors that are not needed are empty."""

    weights: Tensor  # H' [K, ldB]
    slot_weights: Tensor  # S' [M, B]
    moments: Tensor  # U [M, K]; of sub-centers [K, M]
    grad_tau: Tensor  # one element
    grad_bias: Tensor  # [K]
    grad_margin: Tensor  # [K]
    flags: Tensor  # [splits, groups]: 1 if a pair that cancels has won there
    group_classes: int  # classes per group
    split_rows: int  # rows per split
    input_coeffs: Tensor | None = None  # ∂X [B, M] of rotations
    class_coeffs: Tensor | None = None  # ∂Y [2, M, K]


class RoutingPartials(NamedTuple):
    """The outputs of a routing kernel: H', and sums over tiles of classes (groups) or of rows (splits)."""

    weights: Tensor  # H' [K, ldB], not rounded for rotations
    slot_weights: Tensor  # [groups, M, B]
    moments: Tensor  # [splits, M, K]; of sub-centers [splits, K, M]
    tau: Tensor  # [splits, groups]
    bias: Tensor  # [splits, K]
    margin: Tensor  # [splits, K]
    flags: Tensor  # [splits, groups]

    @classmethod
    def allocate(cls, args: LaunchArgs, needs: Needs, splits: int, groups: int) -> RoutingPartials:
        """Return uninitialized tensors; those that are not needed are empty."""
        B, K, _, M = args.sizes
        subcenters = args.centers.dim() == 3  # without displacements, which alone need S'
        need_slot_weights = M > 1 and not subcenters and (needs.input or needs.displacements)
        # Products read H' in half precision. The gradients of rotations' coefficients are sums of the same H', not rounded.
        rotated = args.input_coeffs is not None
        need_weights = needs.input or needs.centers or rotated
        new, acc = args.input.new_empty, args.acc_dtype
        return cls(
            new((K, padded_rows(B)) if need_weights else (0, 0), dtype=acc if rotated else args.store_dtype),
            new((groups if need_slot_weights else 0, M, B), dtype=acc),
            new(
                (splits if needs.centers or needs.displacements else 0, *((K, M) if subcenters else (M, K))),
                dtype=acc,
            ),
            new((splits, groups) if needs.tau else (0, 0), dtype=acc),
            new((splits if needs.bias else 0, K), dtype=acc),
            new((splits if needs.margin else 0, K), dtype=acc),
            new(splits, groups, dtype=torch.int32),
        )

    def switches(self) -> dict[str, bool]:
        """Return the kernel's NEED_ constants: true for each tensor that is not empty."""
        return {
            f"NEED_{name.upper()}": x.numel() > 0 for name, x in zip(self._fields[:6], self, strict=False)
        }


def route(args: LaunchArgs, saved: Saved, needs: Needs) -> Routed:
    """Return H' and its sums, from the gradient of the logits."""
    B, K, _, M = args.sizes
    sizes = args.tile_sizes
    rows, classes, warps = sizes.route_logits_grad if M <= 32 else sizes.route_logits_grad_many
    splits, class_tiles = tiles_of(B, rows), tiles_of(K, classes)
    wanted = min(class_tiles, configs.ROUTE_GROUPS, tiles_of(configs.ROUTE_PROGRAMS, splits))
    group_tiles = tiles_of(class_tiles, wanted)
    groups = tiles_of(class_tiles, group_tiles)
    partials = RoutingPartials.allocate(args, needs, splits, groups)
    switches = partials.switches()
    del switches["NEED_BIAS"], switches["NEED_MARGIN"]
    route_logits_grad_kernel[(splits * groups,)](
        saved.grad, saved.logits, saved.slots, saved.center_rnorms, saved.input_rnorms, args.tau,
        *partials[:4], partials.flags, B, K, padded_rows(B), M, group_tiles,
        BLOCK_B=rows, BLOCK_C=classes, BLOCK_S=power_of_two(M), UNROLLED_SLOTS=configs.unrolled_slots(M),
        MAX_WEIGHT=configs.max_weight(args.dtype), num_warps=warps, **switches,
    )  # fmt: skip
    return reduce_partials(args, partials, group_tiles * classes, rows)


def reduce_partials(
    args: LaunchArgs,
    partials: RoutingPartials,
    group_classes: int,
    split_rows: int,
    coeffs: tuple[Tensor, Tensor] | None = None,
) -> Routed:
    """Return the sums over the first dimension of the partials. A single partial is its own sum.

    Args:
        args, partials: the arguments and the outputs of a routing kernel.
        group_classes, split_rows: the classes per group and the rows per split of that kernel.
        coeffs: the partials of ∂X [groups, B, M] and ∂Y [row tiles, 2, M, K] of rotations, which have no S'.
    """
    by_row, class_coeffs = coeffs or (partials.slot_weights, partials.slot_weights.new_empty(0))
    terms = by_row, partials.moments, partials.bias, partials.margin, class_coeffs
    summed = [x.shape[0] > 1 for x in terms]
    sums = [
        x.new_empty(x.shape[1:]) if needed else x.view(x.shape[1:]) if x.numel() else x
        for x, needed in zip(terms, summed, strict=True)
    ]
    lengths = [x[0].numel() if needed else 0 for x, needed in zip(terms, summed, strict=True)]
    grad_tau = partials.tau.new_empty(1 if partials.tau.numel() else 0)
    count, elements, tau_elements = REDUCE
    programs = sum(tiles_of(length, elements) for length in lengths) + grad_tau.numel()
    if programs:
        reduce_partials_kernel[(programs,)](
            *terms, partials.tau, args.tau, *sums, grad_tau, by_row.shape[0], partials.flags.shape[0],
            class_coeffs.shape[0], *lengths, partials.tau.numel(), BLOCK_P=count, BLOCK_N=elements, BLOCK_T=tau_elements,
        )  # fmt: skip
    return Routed(
        weights=partials.weights,
        slot_weights=partials.slot_weights if coeffs else sums[0],
        moments=sums[1],
        grad_tau=grad_tau,
        grad_bias=sums[2],
        grad_margin=sums[3],
        flags=partials.flags,
        group_classes=group_classes,
        split_rows=split_rows,
        input_coeffs=sums[0] if coeffs else None,
        class_coeffs=sums[4] if coeffs else None,
    )
