"""Tile sizes, and the rule that chooses among them.

Large tiles were chosen by what compilers report: each entry compiles without spilled registers and fits the shared memory
of its target (tests/triton/test_aot.py). Who multiplies, and the tiles of small kernels, an H100 decided (bench/results).

Which entry is used follows from sizes and device alone. A choice by timing, as `triton.autotune` makes it, may fall
out differently in each process, and other tiles sum in another order: the same inputs would not give the same bits.
Those who prefer speed set GISTOPS_TRITON_TUNE=1: the first call of each class of shapes then times the entries, which
synchronises with the GPU. Inside a CUDA graph capture, where that is not allowed, the rule holds: warm up before.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

Target = Literal["hopper", "ampere", "amd", "interpreter"]
Kind = Literal["half", "tf32", "ieee", "f64"]


@dataclass(frozen=True)
class Config:
    """Tile sizes of one of the two large kernels: of classes, rows and dimensions."""

    classes: int
    rows: int
    dims: int
    warps: int
    stages: int

    def arguments(self) -> dict[str, Any]:
        """What the kernel's launch takes."""
        return {
            "BLOCK_C": self.classes,
            "BLOCK_B": self.rows,
            "BLOCK_D": self.dims,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# The forward: acc [classes, rows], the loop over `dims`. Largest first; `first_that_fills` takes them in order.
# Accumulator, maximum and slot take 3 · classes · rows / threads registers in the epilogue: with 64 elements a
# thread (128 x 128 and 8 warps) 192 of 255, which is the limit.
FORWARD: dict[tuple[Target, Kind], tuple[Config, ...]] = {
    ("hopper", "half"): (
        Config(128, 128, 64, 8, 3),  # two warp groups share the rows: most reuse
        Config(64, 128, 64, 4, 4),  # few classes: twice the programs
        Config(128, 64, 64, 8, 4),  # at most 64 rows
        Config(64, 64, 64, 4, 4),  # small problems: four times the programs
    ),
    ("hopper", "tf32"): (
        Config(128, 128, 32, 8, 3),  # a row of 32 is as many bytes as 64 of half precision
        Config(128, 64, 32, 8, 3),  # at most 64 rows, or few classes
        Config(64, 64, 32, 4, 3),  # small problems
    ),
    ("ampere", "half"): (
        Config(128, 128, 32, 8, 3),  # operands pass through registers: half the dims leaves room for them
        Config(128, 64, 32, 8, 4),  # at most 64 rows, or few classes
        Config(64, 64, 32, 4, 4),  # small problems
    ),
    ("ampere", "tf32"): (
        Config(128, 64, 32, 8, 3),  # the three products of the norms take the registers of a larger tile
        Config(64, 64, 32, 8, 3),  # small problems
    ),
    ("amd", "half"): (Config(128, 128, 64, 8, 2), Config(64, 64, 64, 4, 2)),  # 64 KB of LDS: two stages
    ("amd", "tf32"): (Config(64, 64, 32, 4, 2),),
}

# The centres' gradient: acc [classes, dims], the loop over `rows`. It reads w and writes ∂w, which for the usual
# few hundred rows takes longer than the product: tiles small enough for two or three programs a multiprocessor,
# of which one computes while others load and store.
CENTERS: dict[tuple[Target, Kind], tuple[Config, ...]] = {
    ("hopper", "half"): (
        Config(64, 64, 128, 8, 3),  # long rows of w
        Config(64, 64, 64, 4, 3),  # few classes, or d at most 64
    ),
    ("hopper", "tf32"): (Config(64, 32, 64, 8, 3),),
    ("ampere", "half"): (Config(64, 32, 64, 8, 3),),
    ("ampere", "tf32"): (Config(32, 32, 64, 4, 3),),
    ("amd", "half"): (Config(64, 32, 128, 8, 2), Config(64, 32, 64, 4, 2)),  # the second as above
    ("amd", "tf32"): (Config(64, 32, 64, 4, 2),),
}

# float32 in full precision and float64 have no (wide) matrix instructions: sums of products, from small tiles.
for _target in ("hopper", "ampere", "amd"):
    FORWARD[_target, "ieee"] = (Config(64, 64, 16, 4, 2),)
    FORWARD[_target, "f64"] = (Config(32, 32, 16, 4, 2),)
    CENTERS[_target, "ieee"] = (Config(32, 32, 64, 4, 2),)
    CENTERS[_target, "f64"] = (Config(32, 16, 32, 4, 2),)

Product = Literal["fused", "cublas"]
#: Elements of the float32 products H f that are made before they are corrected: 24 MB, half of a Hopper's cache.
STEP_ELEMENTS = 6 << 20
#: Who multiplies. cublas: torch's own library, with kernels of ours before and after. fused: one kernel with an
#: epilogue. For W f' the library was faster on an H100 at every size measured; for H f both took the same. tf32: a guess.
PRODUCTS: dict[Kind, Product] = {"half": "cublas", "tf32": "cublas", "ieee": "cublas", "f64": "cublas"}
CENTERS_PRODUCTS: dict[Kind, Product] = {"half": "cublas", "tf32": "fused", "ieee": "cublas", "f64": "cublas"}

#: Tiles that no rule takes, to be measured: `forced`.
VARIANTS: dict[str, tuple[Config, ...]] = {
    "forward": (Config(64, 128, 64, 4, 3), Config(128, 64, 64, 4, 4), Config(128, 128, 64, 8, 4)),
    "centers": (
        *(Config(64, 64, 128, 4, 3), Config(64, 64, 64, 8, 3), Config(64, 128, 128, 4, 2)),
        *(Config(128, 64, 128, 8, 3), Config(128, 128, 128, 8, 2)),
    ),
}

#: Under the interpreter a program costs the same whatever its tile. Tests set smaller ones here.
INTERPRETER = {"forward": Config(128, 128, 128, 4, 1), "centers": Config(128, 128, 128, 4, 1)}


@dataclass(frozen=True)
class Small:
    """Tile sizes of the kernels that read much and compute little. All run with 4 warps, but for route_logits_grad_kernel."""

    norms: tuple[int, int]  # rows or classes, dimensions; times 16 displacements
    #: Elements and warps of norms_in_registers_kernel, for vectors no longer than that many elements, and few displacements.
    norms_in_registers: tuple[int, int]
    max_over_slots: tuple[int, int, int]  # classes, rows, warps
    rescore: tuple[int, int, int]  # classes, rows, dimensions
    route_logits_grad: tuple[int, int, int]  # rows, classes, warps
    route_logits_grad_many: tuple[int, int, int]  # the same where M > 32: there the sums S' take registers
    lse: tuple[int, int, int]  # classes, rows, warps
    route_loss_grad: tuple[int, int, int]  # likewise
    #: Whether route_loss_grad_kernel writes loops over few slots out, and sums by slot in registers.
    route_loss_grad_unrolled: bool
    route_loss_grad_many: tuple[int, int, int]  # the same where M > 32
    grad_input_epilogue: tuple[
        int, int
    ]  # classes of a look for pairs that cancel; dimensions at most; 8 warps above 1024
    grad_displacements_epilogue: tuple[int, int]  # terms added at a time, dimensions


_HALF = Small(
    norms=(32, 128),
    norms_in_registers=(4096, 1),
    max_over_slots=(128, 32, 4),
    rescore=(32, 32, 16),
    route_logits_grad=(32, 32, 4),
    route_logits_grad_many=(16, 64, 4),
    lse=(16, 64, 4),
    route_loss_grad=(16, 32, 4),
    route_loss_grad_unrolled=True,  # on an H100 a loss's step takes 0.77 to 0.89 of what it takes without
    route_loss_grad_many=(16, 16, 4),
    grad_input_epilogue=(64, 2048),
    grad_displacements_epilogue=(64, 32),
)
_SINGLE = replace(_HALF, norms=(32, 64), norms_in_registers=(2048, 1))
_DOUBLE = replace(
    _HALF,
    lse=(16, 32, 4),
    route_loss_grad_unrolled=False,
    route_logits_grad_many=(16, 32, 4),
    norms=(16, 32),
    norms_in_registers=(1024, 1),
    max_over_slots=(64, 32, 4),
    grad_input_epilogue=(64, 512),
)
SMALL: dict[Kind, Small] = {"half": _HALF, "tf32": _SINGLE, "ieee": _SINGLE, "f64": _DOUBLE}

#: Programs of route_logits_grad_kernel at least, where there is work for them: 8 for each of 132 multiprocessors.
ROUTE_PROGRAMS = 1056
#: Groups of classes at most, which bounds the partial sums S' [groups, M, B].
ROUTE_GROUPS = 256
#: Tiles of reduce_partials_kernel: parts and elements of a sum, and elements of the one sum to a single number.
REDUCE = (16, 64, 1024)
#: Tiles of the loss: rows and groups of classes of row_loss_kernel, elements of reduce_loss_kernel.
ROW_LOSS = (32, 32, 1024)
#: Programs of the loss's large kernels at least, where there is work for them; more make more parts of sums.
LOSS_PROGRAMS = 528


#: Displacements at most, the zero one included, for which loops over slots are written out.
MAX_UNROLLED_SLOTS = 8


def unrolled_slots(M: int) -> int:
    """UNROLLED_SLOTS of the kernels that write loops over slots out."""
    return M if M <= MAX_UNROLLED_SLOTS else 0


def grouped(classes: int, rows: int, tile: tuple[int, ...]) -> tuple[int, int]:
    """The number of class tiles that a program takes, and of such groups."""
    class_tiles = tiles(classes, tile[0])
    wanted = min(class_tiles, tiles(LOSS_PROGRAMS, tiles(rows, tile[1])))
    run = tiles(class_tiles, wanted)
    return run, tiles(class_tiles, run)


def tiles(size: int, tile: int) -> int:
    """The number of tiles that cover a size. `triton.cdiv` would serve, and take fifty times as long."""
    return -(-size // tile)


def power_of_two(size: int) -> int:
    """The least power of two that is not below a size of at least 1; as quick as `tiles`."""
    return 1 << (size - 1).bit_length()


@functools.cache
def target(device: torch.device) -> Target:
    """The table that fits a device."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return "amd"
    # 9.0 and 10.x have 227 KB of shared memory a block, 12.x has 99 KB as 8.6 has.
    return "hopper" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "ampere"


@functools.cache
def processors(device: torch.device) -> int:
    """The number of a device's multiprocessors."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def kind(dtype: torch.dtype, allow_tf32: bool) -> Kind:
    """How products of a dtype are made."""
    if dtype == torch.float64:
        return "f64"
    if dtype == torch.float32:
        return "tf32" if allow_tf32 else "ieee"
    return "half"


class Forced(NamedTuple):
    """Choices in place of the tables and the rule; None where these hold."""

    forward: Config | None = None
    centers: Config | None = None
    product: Product | None = None  # of W f'
    centers_product: Product | None = None  # of H f
    #: Tiles of the small kernels, as in `Small`; norms_in_registers of (0, 1) means norms.
    norms_in_registers: tuple[int, int] | None = None
    norms: tuple[int, int] | None = None
    lse: tuple[int, int, int] | None = None
    max_over_slots: tuple[int, int, int] | None = None
    route_loss_grad: tuple[int, int, int] | None = None
    route_loss_grad_unrolled: bool | None = None
    route_logits_grad: tuple[int, int, int] | None = None


SMALL_FORCED = (
    "norms_in_registers",
    "norms",
    "lse",
    "max_over_slots",
    "route_loss_grad",
    "route_loss_grad_unrolled",
    "route_logits_grad",
)
_forced = Forced()


@contextlib.contextmanager
def forced(**choices: Any) -> Iterator[None]:
    """Calls inside take these tiles and products (`Forced`), to measure them. A forward's tile means a fused forward."""
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
def _small(kind: Kind, forced: Forced) -> Small:
    given = forced._asdict()
    return replace(SMALL[kind], **{n: given[n] for n in SMALL_FORCED if given[n] is not None})


def small(kind: Kind) -> Small:
    """Tiles of the small kernels."""
    return _small(kind, _forced)


def product(kernel: Literal["forward", "centers"], kind: Kind) -> Product:
    """The library or kernel that multiplies."""
    if kernel == "forward":
        return _forced.product or PRODUCTS[kind]
    return _forced.centers_product or CENTERS_PRODUCTS[kind]


def choose(
    kernel: Literal["forward", "centers"],
    device: torch.device,
    product: Kind,
    B: int,
    K: int,
    d: int,
    launch: Callable[[Config], object],
    smallest: bool = False,
) -> Config:
    """The entry for these sizes: by rule, or, with GISTOPS_TRITON_TUNE=1, by timing `launch`.

    Without a product, a kernel is bound by memory, and the smallest tile has the most programs a multiprocessor.
    """
    if (entry := _forced.forward if kernel == "forward" else _forced.centers) is not None:
        return entry
    name = target(device)
    if name == "interpreter":
        return INTERPRETER[kernel]
    entries = (FORWARD if kernel == "forward" else CENTERS)[name, product]
    columns = B if kernel == "forward" else d
    if os.environ.get("GISTOPS_TRITON_TUNE") == "1" and len(entries) > 1:
        shape = tuple(power_of_two(max(n, 16)) for n in (B, K, d))
        if best := tune((kernel, device, product, shape), entries, launch):
            return best
    if smallest:
        return entries[-1]
    return first_that_fills(kernel, entries, K, columns, processors(device))


def first_that_fills(
    kernel: Literal["forward", "centers"], entries: Sequence[Config], K: int, columns: int, processors: int
) -> Config:
    """The first, that is the largest, tile that wastes less than half of its columns and occupies the device.

    Nine tenths of the multiprocessors are enough: a larger tile reads its operands less often, which gains more than
    the last tenth would.
    """
    fitting = []
    width_at_most = max(64, power_of_two(max(columns, 1)))
    for entry in entries:
        width = entry.rows if kernel == "forward" else entry.dims
        if width <= width_at_most:
            fitting.append(entry)
            if 10 * tiles(K, entry.classes) * tiles(columns, width) >= 9 * processors:
                return entry
    return fitting[-1] if fitting else entries[-1]


_tuned: dict[Hashable, Config] = {}


def tune(key: Hashable, entries: Sequence[Config], launch: Callable[[Config], object]) -> Config | None:
    """The fastest entry, timed once for each key and process; None during the capture of a CUDA graph."""
    if key not in _tuned:
        if torch.cuda.is_current_stream_capturing():
            return None
        times = [triton.testing.do_bench(lambda e=e: launch(e), warmup=10, rep=40) for e in entries]
        _tuned[key] = entries[times.index(min(times))]
    return _tuned[key]
