"""The rule that chooses tiles from the tables.

The choice follows from sizes and device alone. A choice by timing, as `triton.autotune` makes it, may differ between
processes; other tiles sum in another order, so the results would not be deterministic.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, NamedTuple

import torch

from . import tile_tables
from .tile_tables import Config, Kind, Product, Target, TileSizes

Kernel = Literal["forward", "centers"]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
#: Under the interpreter a program costs the same whatever its tile. Tests set smaller tiles.
INTERPRETER = {
    "forward": Config(128, 128, 128, 4, 1),
    "centers": Config(128, 128, 128, 4, 1),
    "topk": Config(128, 64, 128, 4, 1),
}
#: Elements of the float32 product H f that are computed before they are corrected: 24 MB, half of a Hopper's cache.
STEP_ELEMENTS = 6 << 20
#: Minimum number of programs of route_logits_grad_kernel, if there is work for them: 8 for each of 132 multiprocessors.
ROUTE_PROGRAMS = 1056
#: Maximum number of class groups, which bounds the partials of S' [groups, M, B].
ROUTE_GROUPS = 256
#: Minimum number of programs of the loss's kernels, if there is work for them. More programs write more partials.
LOSS_PROGRAMS = 528
#: Maximum number of programs of topk_partials_kernel: two for each of 132 multiprocessors, which all run at once.
TOPK_PROGRAMS = 264
#: Maximum M for which loops over slots are unrolled.
MAX_UNROLLED_SLOTS = 8


def unrolled_slots(M: int) -> int:
    """Return the constant UNROLLED_SLOTS: M if it is small, otherwise 0."""
    return M if M <= MAX_UNROLLED_SLOTS else 0


def grouped(classes: int, rows: int, tile: tuple[int, ...]) -> tuple[int, int]:
    """Return the number of class tiles per group, and the number of groups."""
    class_tiles = tiles(classes, tile[0])
    wanted = min(class_tiles, tiles(LOSS_PROGRAMS, tiles(rows, tile[1])))
    group_tiles = tiles(class_tiles, wanted)
    return group_tiles, tiles(class_tiles, group_tiles)


def tiles(size: int, tile: int) -> int:
    """Return the number of tiles that cover a size: `triton.cdiv`, but fifty times as fast."""
    return -(-size // tile)


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is at least `size`, which is at least 1."""
    return 1 << (size - 1).bit_length()


def max_weight(dtype: torch.dtype) -> float:
    """Return the constant MAX_WEIGHT for H' in a dtype: the largest float16, or 0 where H' needs no bound."""
    return 65504.0 if dtype == torch.float16 else 0.0


@functools.cache
def target(device: torch.device) -> Target:
    """Return the name of the tables for a device."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return "amd"
    # 9.0 and 10.x have 227 KB of shared memory per block; 12.x has 99 KB, as 8.6 has.
    return "hopper" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "ampere"


@functools.cache
def processors(device: torch.device) -> int:
    """Return the number of a device's multiprocessors."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def kind(dtype: torch.dtype, allow_tf32: bool) -> Kind:
    """Return how products of a dtype are computed."""
    if dtype == torch.float64:
        return "f64"
    if dtype == torch.float32:
        return "tf32" if allow_tf32 else "ieee"
    return "half"


class Forced(NamedTuple):
    """Choices that override the tables and the rule. None: no override."""

    forward: Config | None = None
    centers: Config | None = None
    topk: Config | None = None
    product: Product | None = None  # for W f'
    centers_product: Product | None = None  # for H f
    #: Fields of `TileSizes`. norms_in_registers=(0, 1) selects norms_kernel.
    norms_in_registers: tuple[int, int] | None = None
    norms: tuple[int, int] | None = None
    lse: tuple[int, int, int] | None = None
    max_over_slots: tuple[int, int, int] | None = None
    route_loss_grad: tuple[int, int, int] | None = None
    route_loss_grad_unrolled: bool | None = None
    route_logits_grad: tuple[int, int, int] | None = None


_FORCED_TILES = tuple(field.name for field in fields(TileSizes) if field.name in Forced._fields)
_forced = Forced()


@contextlib.contextmanager
def forced(**choices: Any) -> Iterator[None]:
    """Override choices within the context, to measure them. A forced tile of a product implies the fused kernel."""
    global _forced
    before = _forced
    if choices.get("forward") is not None:
        choices.setdefault("product", "fused")
    if choices.get("centers") is not None:
        choices.setdefault("centers_product", "fused")
    _forced = before._replace(**choices)
    try:
        yield
    finally:
        _forced = before


@functools.cache
def _tile_sizes(target: Target, kind: Kind, forced: Forced) -> TileSizes:
    given = forced._asdict()
    sizes = tile_tables.tile_sizes(target, kind)
    return replace(sizes, **{n: given[n] for n in _FORCED_TILES if given[n] is not None})


def tile_sizes(device: torch.device, kind: Kind) -> TileSizes:
    """Return the tiles of the memory-bound kernels."""
    return _tile_sizes(target(device), kind, _forced)


def product(kernel: Literal["forward", "centers"], device: torch.device, kind: Kind) -> Product:
    """Return how the product of a kernel is computed: by torch's library, or fused."""
    name = "product" if kernel == "forward" else "centers_product"
    chosen: Product = getattr(_forced, name) or tile_tables.choice(name, target(device), kind)
    return chosen


def topk_tile(device: torch.device, kind: Kind, k: int) -> tuple[Config, int]:
    """Return the tile of topk_partials_kernel, and the length of its lists: the first of the lengths that holds k."""
    keep, n = next((keep, n) for n, keep in enumerate(tile_tables.TOPK_KEEP) if keep >= k)
    name = target(device)
    if _forced.topk is not None:
        return _forced.topk, keep
    if name == "interpreter":
        return INTERPRETER["topk"], keep
    entries: tuple[Config, ...] = tile_tables.choice("topk", name, kind)
    return entries[n], keep


def choose(
    kernel: Kernel, device: torch.device, product: Kind, B: int, K: int, d: int, smallest: bool = False
) -> Config:
    """Return the entry for these sizes.

    Args:
        kernel: the kernel.
        device: the device of the arguments.
        product: how products are computed.
        B, K, d: the sizes.
        smallest: choose the last entry, which has the most programs per multiprocessor. For a kernel whose product is
            precomputed, which makes it memory-bound.
    """
    if (entry := getattr(_forced, kernel)) is not None:
        chosen: Config = entry
        return chosen
    name = target(device)
    if name == "interpreter":
        return INTERPRETER[kernel]
    entries: tuple[Config, ...] = tile_tables.choice(kernel, name, product)
    if smallest:
        return entries[-1]
    return first_that_fills(kernel, entries, K, d if kernel == "centers" else B, processors(device))


def first_that_fills(
    kernel: Kernel, entries: Sequence[Config], K: int, columns: int, processors: int
) -> Config:
    """Return the first entry that wastes less than half of its columns and occupies the device.

    The tables begin with the largest tiles. Tiles for 90 % of the multiprocessors are enough, because a larger tile
    reads its operands less often, which gains more than full occupancy.
    """
    fitting = []
    max_width = max(64, power_of_two(max(columns, 1)))
    for entry in entries:
        width = entry.dims if kernel == "centers" else entry.rows
        if width <= max_width:
            fitting.append(entry)
            if 10 * tiles(K, entry.classes) * tiles(columns, width) >= 9 * processors:
                return entry
    return fitting[-1] if fitting else entries[-1]
