"""The tables of tile sizes.

The tiles of the matrix product kernels follow from compilers' reports: each entry compiles without spilled registers and
fits its target's shared memory (tests/triton/test_aot.py). The choice between torch's library and a fused kernel, and
the tiles of the memory-bound kernels, follow from timings on an H100 (bench/results).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

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
    parts: int = 1  # for a loss: the parts of the rows that the epilogue takes one after the other

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of the kernel's launch."""
        return {
            "BLOCK_C": self.classes,
            "BLOCK_B": self.rows,
            "BLOCK_D": self.dims,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# The forward accumulates [classes, rows] in a loop over dims. Largest first: `first_that_fills` tries them in order.
# In the epilogue the accumulator, the maximum and the slot take 3 · classes · rows / threads registers. At 64 elements
# per thread (128 x 128 with 8 warps) that is 192 of 255, the limit.
FORWARD: dict[tuple[Target, Kind], tuple[Config, ...]] = {
    ("hopper", "half"): (
        Config(128, 128, 64, 8, 3),  # two warp groups share the rows: most reuse
        Config(64, 128, 64, 4, 4),  # few classes: twice the programs
        Config(128, 64, 64, 8, 4),  # at most 64 rows
        Config(64, 64, 64, 4, 4),  # small problems: four times the programs
    ),
    ("hopper", "tf32"): (
        Config(128, 128, 32, 8, 3),  # 32 elements are as many bytes as 64 in half precision
        Config(128, 64, 32, 8, 3),  # at most 64 rows, or few classes
        Config(64, 64, 32, 4, 3),  # small problems
    ),
    ("ampere", "half"): (
        Config(128, 128, 32, 8, 3),  # operands pass through registers, so dims are halved to make room
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

# The gradient of the centers accumulates [classes, dims] in a loop over rows. It reads w and writes ∂w, which for the
# usual few hundred rows takes longer than the product. Tiles are small enough for two or three programs per
# multiprocessor, so that one computes while others load and store.
CENTERS: dict[tuple[Target, Kind], tuple[Config, ...]] = {
    ("hopper", "half"): (
        Config(64, 64, 128, 8, 3),  # long rows of w
        Config(64, 64, 64, 4, 3),  # few classes, or d at most 64
    ),
    ("hopper", "tf32"): (Config(64, 32, 64, 8, 3),),
    ("ampere", "half"): (Config(64, 32, 64, 8, 3),),
    ("ampere", "tf32"): (Config(32, 32, 64, 4, 3),),
    ("amd", "half"): (
        Config(64, 32, 128, 8, 2),
        Config(64, 32, 64, 4, 2),
    ),  # the second for few classes or small d
    ("amd", "tf32"): (Config(64, 32, 64, 4, 2),),
}

# The fused kernels of a loss accumulate as the forward does. Their epilogues take a few rows of the tile at a time.
# The rule takes the first that fills the device; so wider tiles than the first serve measurements alone.
LOSS: dict[tuple[Target, Kind], tuple[Config, ...]] = {
    ("hopper", "half"): (
        Config(128, 128, 64, 8, 3, 8),
        Config(128, 256, 64, 8, 3, 8),
        Config(64, 256, 64, 4, 2, 8),
        Config(64, 128, 64, 4, 4, 8),  # few classes
    ),
}

# Full-precision float32 and float64 have no wide matrix instructions. They use fused multiply-adds on small tiles.
for _target in ("hopper", "ampere", "amd"):
    FORWARD[_target, "ieee"] = (Config(64, 64, 16, 4, 2),)
    FORWARD[_target, "f64"] = (Config(32, 32, 16, 4, 2),)
    CENTERS[_target, "ieee"] = (Config(32, 32, 64, 4, 2),)
    CENTERS[_target, "f64"] = (Config(32, 16, 32, 4, 2),)

#: How W f' and H f are multiplied. cublas: torch's library, with our kernels before and after. fused: one kernel with an
#: epilogue. On an H100 the library was faster for W f' at every size measured, and as fast for H f. tf32 is unmeasured.
PRODUCTS: dict[Kind, Product] = {"half": "cublas", "tf32": "cublas", "ieee": "cublas", "f64": "cublas"}
CENTERS_PRODUCTS: dict[Kind, Product] = {"half": "cublas", "tf32": "fused", "ieee": "cublas", "f64": "cublas"}


@dataclass(frozen=True)
class FusedLimits:
    """The sizes at which a loss's product is fused."""

    scores: int  # minimum of B·K
    dims: int  # maximum of d


#: Where a loss computes W f' in the kernels that use it. Predicted, not measured, from figures of an H100 (bench/results):
#: at 256x8142x2048 the fused product of the logits took 64 µs, 133 TFLOP/s, and the library's 19 µs, 450 TFLOP/s. So fusing
#: costs 2 d (1/133 - 1/450) = 0.0106 d ps per score. It saves the write and the read of a score of 4 bytes, 2.7 ps at
#: 3.0 TB/s, in each direction that computes the product: a gain for d below 250 where the scores do not fit the L2 of
#: 50 MB. The limits allow for an error of a factor of two; 2^24 scores are 67 MB.
FUSED_LOSS: dict[tuple[Target, Kind], FusedLimits] = {("hopper", "half"): FusedLimits(1 << 24, 128)}


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
    route_loss_grad: tuple[int, int, int]  # classes, rows, warps
    route_loss_grad_unrolled: bool  # unroll loops over few slots and keep S' in registers
    route_loss_grad_many: tuple[int, int, int]  # as route_loss_grad, for M > 32
    grad_input_epilogue: tuple[
        int, int
    ]  # classes searched for pairs that cancel, dims at most; 8 warps above 1024
    grad_displacements_epilogue: tuple[int, int]  # rows or class tiles added at a time, dims


_HALF = TileSizes(
    norms=(32, 128),
    norms_in_registers=(4096, 1),
    max_over_slots=(128, 32, 4),
    rescore=(32, 32, 16),
    route_logits_grad=(32, 32, 4),
    route_logits_grad_many=(16, 64, 4),
    lse=(16, 64, 4),
    route_loss_grad=(16, 32, 4),
    route_loss_grad_unrolled=True,  # on an H100 a loss's step takes 0.77 to 0.89 of the time without
    route_loss_grad_many=(16, 16, 4),
    grad_input_epilogue=(64, 2048),
    grad_displacements_epilogue=(64, 32),
)
_SINGLE = replace(_HALF, norms=(32, 64), norms_in_registers=(2048, 1))
_DOUBLE = replace(
    _HALF,
    norms=(16, 32),
    norms_in_registers=(1024, 1),
    max_over_slots=(64, 32, 4),
    route_logits_grad_many=(16, 32, 4),
    lse=(16, 32, 4),
    route_loss_grad_unrolled=False,
    grad_input_epilogue=(64, 512),
)
TILE_SIZES: dict[Kind, TileSizes] = {"half": _HALF, "tf32": _SINGLE, "ieee": _SINGLE, "f64": _DOUBLE}

#: Tiles of reduce_partials_kernel: partials, elements, and elements of the sum for τ.
REDUCE = (16, 64, 1024)
#: Tiles of row_loss_kernel, rows and class groups, and of reduce_loss_kernel, elements.
ROW_LOSS = (32, 32, 1024)
