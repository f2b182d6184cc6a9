"""The launches from vectors to the partial log-sum-exps of a loss, and the chunks of classes in which they work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from ...operators.cross_entropy import CrossEntropyBackward, CrossEntropyForward, padded_rows
from . import configs, loss_forms
from .cancellation_lse import rescore_cancelled_lse_kernel
from .configs import grouped, power_of_two
from .configs import tiles as tiles_of
from .launch_args import LaunchArgs, multiply
from .lse import lse_kernel

Loss = CrossEntropyForward | CrossEntropyBackward
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
    """The tensors between the kernels of the log-sum-exps and row_loss_kernel."""

    target_logits: Tensor  # [B]
    lse: Tensor  # [3, groups, B], or [2, groups, B] without label smoothing
    class_sums: Tensor  # [2, groups]

    @classmethod
    def allocate(cls, args: LaunchArgs, groups: int, smoothing: bool) -> Partials:
        """Return uninitialized tensors."""
        B, new, acc = args.sizes[0], args.input.new_empty, args.acc_dtype
        return cls(new(B, dtype=acc), new(2 + smoothing, groups, B, dtype=acc), new(2, groups, dtype=acc))


class Norms(NamedTuple):
    """The inverse norms of a chunk, and the products f_i·δ_j."""

    center_rnorms: Tensor  # [M, K]; of sub-centers [K, M]
    input_rnorms: Tensor  # [B]
    shifts: Tensor  # [M, B]


def chunks(args: LaunchArgs, size: int, tile: tuple[int, int, int]) -> Iterator[Chunk]:
    """Yield chunks of at most `size` classes. The tile holds classes, rows and warps."""
    B, K, _, _ = args.sizes
    classes, rows, warps = tile
    rows = min(rows, power_of_two(max(B, 16)))
    count = 0
    for first in range(0, K, size):
        chunk_args = loss_forms.chunk_of(args, slice(first, first + size))
        group_tiles, groups = grouped(chunk_args.sizes[1], max(B, 1), (classes, rows))
        yield Chunk(first, chunk_args, (classes, rows, warps), group_tiles, groups, count)
        count += groups


def chunk_size(args: LaunchArgs, keep_scores: bool) -> int:
    """Return the number of classes per chunk."""
    per_class = loss_forms.memory_per_class(args, keep_scores)
    if not per_class:
        return args.sizes[1]
    vectors = args.sizes[3] if loss_forms.has_subcenters(args) else 1
    return max(64 // vectors, 1, CHUNK_ELEMENTS // per_class // 64 * 64)


def score(c: Chunk, a: Loss, scores: Tensor, slots: Tensor | None, norms: Norms, partials: Partials) -> None:
    """Compute a chunk's partials of the log-sum-exp.

    Args:
        c: the chunk.
        a: the arguments of the loss.
        scores: [K, ldB]: the memory of the product, and of the logits with `slots`.
        slots: [K, ldB]: written with the logits; None if neither is kept.
        norms: the chunk's norms.
        partials: the partials of all chunks, in which this chunk's part is written.
    """
    args = c.args
    B, K, _, M = args.sizes
    options = _options(c, a, slots is not None)
    bias, weight = _class_vectors(c, a)
    groups, stride = partials.lse.shape[1], padded_rows(B)
    scored = loss_forms.has_score_kernel(args)
    if scored:
        loss_forms.compute_scores(args, norms.center_rnorms, norms.input_rnorms, scores, slots)
        options["STASH"] = False
    else:
        multiply(args.centers, args.input.t(), scores[:, :B])
    lse_kernel[(c.groups * tiles_of(B, c.tile[1]),)](
        scores, slots, norms.center_rnorms, norms.shifts, norms.input_rnorms, args.tau, a.target, bias, weight,
        *partials, B, K, stride, M, c.group_tiles, c.first_class, c.first_group, groups, a.ignore_index,
        BLOCK_C=c.tile[0], BLOCK_B=c.tile[1], SCORED=scored, num_warps=c.tile[2],
        UNROLLED_SLOTS=0 if scored else configs.unrolled_slots(M), **options,
    )  # fmt: skip
    rescore_cancelled(c, a, scores, slots, norms, partials)


def rescore_cancelled(
    c: Chunk, a: Loss, scores: Tensor, slots: Tensor | None, norms: Norms, partials: Partials
) -> None:
    """Recompute the groups of a chunk in which a pair cancels. The arguments are those of `score`."""
    args = c.args
    B, K, d, M = args.sizes
    if M == 1 or loss_forms.has_subcenters(args):
        return
    classes, rows, dims = args.tile_sizes.rescore
    classes = min(classes, c.tile[0])
    rescore_cancelled_lse_kernel[(c.groups,)](
        args.input, args.centers, args.displacements, args.tau, norms.input_rnorms, scores, slots,
        norms.center_rnorms, a.target, *_class_vectors(c, a), partials.target_logits, partials.lse,
        B, K, d, padded_rows(B), M, c.group_tiles * (c.tile[0] // classes), c.first_class, c.first_group,
        partials.lse.shape[1], a.ignore_index, BLOCK_C=classes, BLOCK_B=rows, BLOCK_D=dims,
        **_options(c, a, slots is not None),
    )  # fmt: skip


def _class_vectors(c: Chunk, a: Loss) -> tuple[Tensor | None, ...]:
    """Return a chunk's biases and weights."""
    classes = slice(c.first_class, c.first_class + c.args.sizes[1])
    return tuple(None if x is None else x[classes] for x in (a.class_bias, a.weight))


def _options(c: Chunk, a: Loss, stash: bool) -> dict[str, Any]:
    sums = a.label_smoothing > 0
    return {
        "STASH": stash, "HAS_BIAS": a.class_bias is not None, "HAS_WEIGHT": a.weight is not None and sums,
        "SUMS": sums, **c.args.constants("ACC"),
    }  # fmt: skip
