"""The table of choices: how products are computed, tiles and limits, each entry with its source.

A source says "measured" with a file of bench/results, "compiled" or "predicted". Compiled: the tiles spill no registers and
fit the target's shared memory (tests/triton/test_aot.py); their order is predicted. Predicted: by calculation or by
analogy, until a measurement replaces the entry. `python -m bench.gpu --day` prints the entries to paste here for what its
rule has selected.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

Target = Literal["hopper", "ampere", "amd", "interpreter"]
Kind = Literal["half", "tf32", "ieee", "f64"]
Product = Literal["fused", "cublas"]


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch parameters of a matrix product kernel."""

    classes: int
    rows: int
    dims: int
    warps: int
    stages: int

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of the kernel's launch."""
        return {
            "BLOCK_C": self.classes,
            "BLOCK_B": self.rows,
            "BLOCK_D": self.dims,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


class Choice(NamedTuple):
    """A value and its source."""

    value: Any
    source: str


H100 = "measured: bench/results/nvidia-h100-80gb-hbm3-2026-11-26.md"
COMPILED = "compiled"
AS_H100 = "predicted: as measured on an H100"
AS_KINDS = "predicted: as for the other kinds"
BY_CALCULATION = "predicted: by calculation; compiled without spills"
FMA = "compiled: no wide matrix instructions; fused multiply-adds on small tiles"

#: (name, target, kind) -> choice. "any" stands for all others.
CHOICES: dict[tuple[str, str, str], Choice] = {
    # How W f' and H f are multiplied. cublas: torch's library, with our kernels before and after. fused: one kernel with an
    # epilogue. On an H100 the library was faster for W f' at every size measured, and as fast for H f.
    ("product", "any", "any"): Choice("cublas", AS_H100),
    ("product", "hopper", "half"): Choice("cublas", H100),
    ("product", "hopper", "ieee"): Choice("cublas", H100),
    ("centers_product", "any", "any"): Choice("cublas", AS_H100),
    ("centers_product", "hopper", "half"): Choice("cublas", H100),
    ("centers_product", "any", "tf32"): Choice("fused", "predicted: the correction needs no pass of its own"),
    # The forward accumulates [classes, rows] in a loop over dims. Largest first: `first_that_fills` tries them in order.
    # In the epilogue the accumulator, the maximum and the slot take 3 · classes · rows / threads registers. At 64 elements
    # per thread (128 x 128 with 8 warps) that is 192 of 255, the limit.
    ("forward", "hopper", "half"): Choice(
        (
            Config(128, 128, 64, 8, 3),  # two warp groups share the rows: most reuse
            Config(64, 128, 64, 4, 4),  # few classes: twice the programs
            Config(128, 64, 64, 8, 4),  # at most 64 rows
            Config(64, 64, 64, 4, 4),  # small problems: four times the programs
        ),
        COMPILED,
    ),
    ("forward", "hopper", "tf32"): Choice(
        (
            Config(128, 128, 32, 8, 3),  # 32 elements are as many bytes as 64 in half precision
            Config(128, 64, 32, 8, 3),  # at most 64 rows, or few classes
            Config(64, 64, 32, 4, 3),  # small problems
        ),
        COMPILED,
    ),
    ("forward", "ampere", "half"): Choice(
        (
            Config(128, 128, 32, 8, 3),  # operands pass through registers, so dims are halved to make room
            Config(128, 64, 32, 8, 4),  # at most 64 rows, or few classes
            Config(64, 64, 32, 4, 4),  # small problems
        ),
        COMPILED,
    ),
    ("forward", "ampere", "tf32"): Choice(
        (
            Config(128, 64, 32, 8, 3),  # the three products of the norms take the registers of a larger tile
            Config(64, 64, 32, 8, 3),  # small problems
        ),
        COMPILED,
    ),
    ("forward", "amd", "half"): Choice(
        (Config(128, 128, 64, 8, 2), Config(64, 64, 64, 4, 2)), COMPILED
    ),  # 64 KB of LDS: two stages
    ("forward", "amd", "tf32"): Choice((Config(64, 64, 32, 4, 2),), COMPILED),
    ("forward", "any", "ieee"): Choice((Config(64, 64, 16, 4, 2),), FMA),
    ("forward", "any", "f64"): Choice((Config(32, 32, 16, 4, 2),), FMA),
    # The gradient of the centers accumulates [classes, dims] in a loop over rows. It reads w and writes ∂w, which for the
    # usual few hundred rows takes longer than the product. Tiles are small enough for two or three programs per
    # multiprocessor, so that one computes while others load and store.
    ("centers", "hopper", "half"): Choice(
        (
            Config(64, 64, 128, 8, 3),  # long rows of w
            Config(64, 64, 64, 4, 3),  # few classes, or d at most 64
        ),
        COMPILED,
    ),
    ("centers", "hopper", "tf32"): Choice((Config(64, 32, 64, 8, 3),), COMPILED),
    ("centers", "ampere", "half"): Choice((Config(64, 32, 64, 8, 3),), COMPILED),
    ("centers", "ampere", "tf32"): Choice((Config(32, 32, 64, 4, 3),), COMPILED),
    ("centers", "amd", "half"): Choice(
        (
            Config(64, 32, 128, 8, 2),
            Config(64, 32, 64, 4, 2),
        ),
        COMPILED,
    ),  # the second for few classes or small d
    ("centers", "amd", "tf32"): Choice((Config(64, 32, 64, 4, 2),), COMPILED),
    ("centers", "any", "ieee"): Choice((Config(32, 32, 64, 4, 2),), FMA),
    ("centers", "any", "f64"): Choice((Config(32, 16, 32, 4, 2),), FMA),
    # Top-k accumulates as the forward does. An entry holds the tile per length of the lists, TOPK_KEEP. Rows are 64 since
    # wgmma multiplies 64 rows at least. Keys of 8 bytes take twice the registers of the products, so that a thread holds
    # 32 products at most; the lists take as many again at a length of 64. By calculation two programs of 4 warps per
    # multiprocessor, of which one multiplies while the other selects, come before a larger tile.
    ("topk", "hopper", "half"): Choice((Config(64, 64, 64, 4, 3), Config(32, 64, 64, 4, 3)), BY_CALCULATION),
    ("topk", "hopper", "tf32"): Choice((Config(32, 64, 32, 4, 3),) * 2, BY_CALCULATION),
    ("topk", "any", "half"): Choice((Config(64, 64, 64, 8, 3),) * 2, BY_CALCULATION),
    ("topk", "any", "tf32"): Choice((Config(64, 64, 32, 8, 3),) * 2, BY_CALCULATION),
    ("topk", "any", "ieee"): Choice((Config(64, 64, 16, 8, 2),) * 2, FMA),
    ("topk", "amd", "half"): Choice((Config(64, 64, 64, 4, 2),) * 2, BY_CALCULATION),
    ("topk", "amd", "tf32"): Choice((Config(64, 64, 32, 4, 2),) * 2, BY_CALCULATION),
    ("topk", "amd", "ieee"): Choice((Config(64, 64, 16, 4, 2),) * 2, FMA),
    # Tiles of the memory-bound kernels, the fields of TileSizes.
    ("norms", "any", "half"): Choice((32, 128), H100),
    ("norms", "any", "any"): Choice((32, 64), "predicted: the bytes of half precision"),
    ("norms", "any", "f64"): Choice((16, 32), "predicted: the bytes of half precision"),
    ("norms_in_registers", "any", "half"): Choice((4096, 1), H100),
    ("norms_in_registers", "any", "ieee"): Choice((2048, 1), H100),
    ("norms_in_registers", "any", "any"): Choice((2048, 1), AS_KINDS),
    ("norms_in_registers", "any", "f64"): Choice((1024, 1), "predicted: the bytes of half precision"),
    ("max_over_slots", "any", "any"): Choice((128, 32, 4), H100),
    ("max_over_slots", "any", "f64"): Choice((64, 32, 4), COMPILED),
    ("rescore", "any", "any"): Choice((32, 32, 16), COMPILED),
    ("route_logits_grad", "any", "any"): Choice((32, 32, 4), H100),
    ("route_logits_grad_many", "any", "any"): Choice((16, 64, 4), COMPILED),
    ("route_logits_grad_many", "any", "f64"): Choice((16, 32, 4), COMPILED),
    ("lse", "any", "any"): Choice((16, 64, 4), H100),
    ("lse", "any", "f64"): Choice((16, 32, 4), COMPILED),
    ("subcenters", "any", "any"): Choice((16, 64, 4), COMPILED),
    ("subcenters", "any", "f64"): Choice((16, 32, 4), COMPILED),
    ("route_loss_grad", "any", "any"): Choice((16, 32, 4), H100),
    # On an H100 a loss's step takes 0.77 to 0.89 of the time without.
    ("route_loss_grad_unrolled", "any", "any"): Choice(True, H100),
    ("route_loss_grad_unrolled", "any", "f64"): Choice(False, COMPILED),
    ("route_loss_grad_many", "any", "any"): Choice((16, 16, 4), COMPILED),
    ("grad_input_epilogue", "any", "any"): Choice((64, 2048), COMPILED),
    ("grad_input_epilogue", "any", "f64"): Choice((64, 512), COMPILED),
    ("grad_displacements_epilogue", "any", "any"): Choice((64, 32), COMPILED),
}


def choice(name: str, target: str, kind: str) -> Any:
    """Return the entry for a target and a kind; an entry for one target comes before an entry for all.

    Raises:
        KeyError: no entry serves them.
    """
    for key in ((name, target, kind), (name, "any", kind), (name, target, "any"), (name, "any", "any")):
        if key in CHOICES:
            return CHOICES[key].value
    raise KeyError((name, target, kind))


@dataclass(frozen=True)
class TileSizes:
    """Tile sizes of the memory-bound kernels. Kernels whose entry names no warps run with 4."""

    norms: tuple[int, int]  # rows or classes, dims; times 16 slots
    norms_in_registers: tuple[int, int]  # elements, the longest vector; warps
    max_over_slots: tuple[int, int, int]  # classes, rows, warps
    rescore: tuple[int, int, int]  # classes, rows, dims
    route_logits_grad: tuple[int, int, int]  # rows, classes, warps
    route_logits_grad_many: tuple[int, int, int]  # the same for M > 32, where S' takes many registers
    lse: tuple[int, int, int]  # classes, rows, warps
    subcenters: tuple[int, int, int]  # classes, rows, warps; of sub-centers and rotations
    route_loss_grad: tuple[int, int, int]  # classes, rows, warps
    route_loss_grad_unrolled: bool  # unroll loops over few slots and keep S' in registers
    route_loss_grad_many: tuple[int, int, int]  # as route_loss_grad, for M > 32
    grad_input_epilogue: tuple[
        int, int
    ]  # classes searched for pairs that cancel, dims at most; 8 warps above 1024
    grad_displacements_epilogue: tuple[int, int]  # rows or class tiles added at a time, dims


@functools.cache
def tile_sizes(target: str, kind: str) -> TileSizes:
    """Return the tiles of the memory-bound kernels."""
    return TileSizes(**{field.name: choice(field.name, target, kind) for field in fields(TileSizes)})


#: Tiles of reduce_partials_kernel: partials, elements, and elements of the sum for τ.
REDUCE = (16, 64, 1024)
#: Tiles of row_loss_kernel, rows and class groups, and of reduce_loss_kernel, elements.
ROW_LOSS = (32, 32, 1024)
#: Lengths of the lists of topk_partials_kernel; the last is the largest k that it serves.
TOPK_KEEP = (16, 64)
#: Candidates of a row that topk_merge_kernel holds, and warps: the first that suffices. The last bounds the number of lists.
TOPK_MERGE = ((1024, 4), (8192, 8))
