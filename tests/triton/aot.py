"""Ahead-of-time compilation of every kernel in every shipped configuration, for GPUs that need not be present.

`python -m tests.triton.aot` prints what the compilers report as a Markdown table, in a few minutes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from gistops.backends.triton import tile_tables
from gistops.backends.triton.cancellation import rescore_cancelled_kernel
from gistops.backends.triton.cancellation_lse import rescore_cancelled_lse_kernel
from gistops.backends.triton.configs import TOPK_PROGRAMS, power_of_two
from gistops.backends.triton.forward import forward_kernel
from gistops.backends.triton.grad_centers import grad_centers_kernel
from gistops.backends.triton.grad_epilogues import grad_epilogues_kernel
from gistops.backends.triton.lse import lse_kernel
from gistops.backends.triton.max_over_slots import max_over_slots_kernel
from gistops.backends.triton.norms import norms_in_registers_kernel, norms_kernel
from gistops.backends.triton.reduce_partials import reduce_partials_kernel
from gistops.backends.triton.rotations import grad_coeffs_kernel, rotation_scores_kernel
from gistops.backends.triton.route_logits_grad import route_logits_grad_kernel
from gistops.backends.triton.route_loss_grad import route_loss_grad_kernel
from gistops.backends.triton.row_loss import reduce_loss_kernel, row_loss_kernel
from gistops.backends.triton.subcenters import expand_weights_kernel, subcenter_scores_kernel
from gistops.backends.triton.tile_tables import Config
from gistops.backends.triton.topk_kernels import (
    topk_cancelled_kernel,
    topk_merge_kernel,
    topk_partials_kernel,
)

from .compilation import DTYPES, TABLES, TARGETS, Case, Report, compile_case


def cases(target: str, dtype: str) -> Iterator[Case]:
    """Yield every case that the backend may launch for a target and a dtype, except switches that leave out work."""
    _, kind = DTYPES[dtype]
    acc = tl.float64 if kind == "f64" else tl.float32
    precise = "tf32x3" if kind == "tf32" and target.startswith("sm") else "ieee"
    precision = "tf32" if kind == "tf32" else "ieee"
    products = {"ACC": acc, "PRECISION": precision, "WIDEN": False}
    corrections = {
        "SPLIT_BF16": dtype == "bf16",
        "CORRECTION_PRECISION": "tf32x3" if kind in ("half", "tf32") and target.startswith("sm") else "ieee",
    }
    table = TABLES[target], kind
    storages = ((True, False), (False, True)) if kind == "half" else ((True, False),)  # with slots, narrow
    for config in tile_tables.choice("forward", *table):
        yield _large(forward_kernel, dtype, target, config, products | {"NEED_SLOTS": True})
    for config in tile_tables.choice("centers", *table):
        for needs in ((True, True), (True, False), (False, True)):
            precomputed = tile_tables.choice("centers_product", *table) == "cublas" and needs[0]
            switches = {"NEED_CENTERS": needs[0], "NEED_DISPLACEMENTS": needs[1], "PRECOMPUTED": precomputed}
            yield _large(grad_centers_kernel, dtype, target, config, products | corrections | switches)
    sizes = tile_tables.tile_sizes(*table)
    small: list[tuple[Any, dict[str, Any]]] = [
        (
            reduce_partials_kernel,
            dict(zip(("BLOCK_P", "BLOCK_N", "BLOCK_T"), tile_tables.REDUCE, strict=True)),
        ),
        (reduce_loss_kernel, {"BLOCK": tile_tables.ROW_LOSS[2], "REDUCED": True, "MEAN": True}),
    ]
    counts = (5, 0)
    for need_slots, narrow in storages:
        stored = {"ACC": acc, "NEED_SLOTS": need_slots}
        for count in counts:
            *tiles, warps = sizes.max_over_slots
            constants = _tiles("CB", tuple(tiles)) | stored | {"UNROLLED_SLOTS": count}
            yield Case(max_over_slots_kernel, dtype, target, constants, warps, narrow=narrow)
        constants = _tiles("CBD", sizes.rescore) | stored
        yield Case(rescore_cancelled_kernel, dtype, target, constants, narrow=narrow)
    elements, warps = sizes.norms_in_registers
    for dims in (64, elements // 2, elements):
        constants = {
            "BLOCK_R": min(elements // dims, 64),
            "BLOCK_D": dims,
            "UNROLLED_SLOTS": 5,
            "ACC": acc,
            "WIDEN": False,
        }
        yield Case(norms_in_registers_kernel, dtype, target, constants, warps)
    for slots in (16, 1):
        constants = {"BLOCK_S": slots, "ACC": acc, "NORM_PRECISION": precise, "WIDEN": False}
        yield Case(norms_kernel, dtype, target, _tiles("RD", sizes.norms) | constants)
    for whole, rotated in ((True, False), (False, False), (True, True), (False, True)):
        constants = _tiles("CD", sizes.grad_input_epilogue) | _tiles("RE", sizes.grad_displacements_epilogue)
        constants |= {
            "BLOCK_G": 256,
            "WHOLE": whole,
            "NEED_INPUT": True,
            "NEED_DISPLACEMENTS": not rotated,
            "ROTATED": rotated,
            "ACC": acc,
        }
        warps = 8 if sizes.grad_input_epilogue[1] > 1024 else 4
        yield Case(grad_epilogues_kernel, dtype, target, constants, warps)
    every_option = {"HAS_BIAS": True, "HAS_WEIGHT": True, "SUMS": True, "STASH": True}
    subcenters, warps = _tiles("CB", sizes.subcenters[:2]), sizes.subcenters[2]
    for kernel in (subcenter_scores_kernel, rotation_scores_kernel):
        for need_slots in (True, False):
            constants = subcenters | {"NEED_SLOTS": need_slots, "ACC": acc}
            yield Case(kernel, dtype, target, constants, warps)
    yield Case(expand_weights_kernel, dtype, target, subcenters, warps)
    largest = 65504.0 if dtype == "f16" else 0.0
    for rounds in (True, False) if kind == "half" else (False,):
        constants = subcenters | {"ROUND": rounds, "MAX_WEIGHT": largest if rounds else 0.0, "ACC": acc}
        yield Case(grad_coeffs_kernel, dtype, target, constants, warps)
    no_option = dict.fromkeys(every_option, False)
    for options in (every_option, no_option | {"STASH": True}, no_option):
        for count in counts:
            constants = _tiles("CB", sizes.lse[:2]) | {"ACC": acc, "UNROLLED_SLOTS": count} | options
            yield Case(lse_kernel, dtype, target, constants | {"SCORED": False}, sizes.lse[2])
            if options["SUMS"] and count == 0:
                constants |= {"SCORED": True, "STASH": False}
                yield Case(lse_kernel, dtype, target, constants, sizes.lse[2])
    rescore_tiles = (min(sizes.rescore[0], sizes.lse[0]), *sizes.rescore[1:])
    yield Case(
        rescore_cancelled_lse_kernel,
        dtype,
        target,
        _tiles("CBD", rescore_tiles) | {"ACC": acc} | every_option,
    )
    for margin in (0, 3):
        constants = {
            "BLOCK_B": tile_tables.ROW_LOSS[0], "BLOCK_G": tile_tables.ROW_LOSS[1], "MARGIN": margin, "MARGIN_EACH": margin > 0,
            "SMOOTHING": 0.1 if margin else 0.0, "REDUCED": True, "HAS_BIAS": True, "HAS_WEIGHT": margin > 0,
        }  # fmt: skip
        yield Case(row_loss_kernel, dtype, target, constants)
    if kind != "f64":
        yield from _topk_cases(dtype, target, products)
    needs_all = {f"NEED_{what}": True for what in ("WEIGHTS", "SLOT_WEIGHTS", "MOMENTS", "TAU")}
    for tiles, slots, warps in (
        (sizes.route_logits_grad[:2], 8, sizes.route_logits_grad[2]),
        (sizes.route_logits_grad[:2], 32, sizes.route_logits_grad[2]),
        (sizes.route_logits_grad_many[:2], 256, sizes.route_logits_grad_many[2]),
    ):
        count = 5 if slots == 8 else 0
        constants = (
            _tiles("BC", tiles)
            | {"BLOCK_S": slots, "UNROLLED_SLOTS": count, "MAX_WEIGHT": largest}
            | needs_all
        )
        for _, narrow in storages:
            yield Case(route_logits_grad_kernel, dtype, target, constants, warps, narrow=narrow)
    usual = {"MEAN": True, "HAS_LOSS": True, "SMOOTHING": 0.0}
    rare = [*(f"HAS_{what}" for what in ("LSE", "BIAS", "WEIGHT", "MARGIN")), "NEED_BIAS", "NEED_MARGIN"]
    for slots in (1, 8, 256):
        for mode in (
            usual | dict.fromkeys(rare, False),
            usual | dict.fromkeys(rare, True) | {"SMOOTHING": 0.1},
        ):
            tiles = sizes.route_loss_grad if slots < 64 else sizes.route_loss_grad_many
            counted = {"UNROLLED_SLOTS": 5 if slots == 8 and sizes.route_loss_grad_unrolled else 0}
            constants = (
                _tiles("CB", tiles[:2])
                | {"BLOCK_S": slots, "MAX_WEIGHT": largest}
                | counted
                | needs_all
                | mode
            )
            for from_products, interleaved in ((False, False), (True, False), (False, True)):
                form = {"PRODUCTS": from_products, "INTERLEAVED": interleaved}
                form |= {"NEED_SLOT_WEIGHTS": not interleaved}
                yield Case(route_loss_grad_kernel, dtype, target, constants | form, tiles[2])
    for kernel, constants in small:
        yield Case(kernel, dtype, target, constants)


def _topk_cases(dtype: str, target: str, products: dict[str, Any]) -> Iterator[Case]:
    table = TABLES[target], DTYPES[dtype][1]
    lengths = zip(tile_tables.TOPK_KEEP, tile_tables.choice("topk", *table), strict=True)
    for keep, config in lengths:
        for count, every in ((5, True), (0, False)):
            constants = {"KEEP": keep, "HAS_BIAS": every, "NEED_LSE": every}
            unrolled = {"UNROLLED_SLOTS": count}
            yield _large(topk_partials_kernel, dtype, target, config, products | constants | unrolled)
        tiles = tile_tables.tile_sizes(*table).rescore
        tiles = (min(tiles[0], config.classes), *tiles[1:])
        constants = {"KEEP": keep, "ACC": products["ACC"], "HAS_BIAS": True, "NEED_LSE": True}
        yield Case(topk_cancelled_kernel, dtype, target, _tiles("CBD", tiles) | constants)
    for block, warps in tile_tables.TOPK_MERGE:
        constants = {"BLOCK": block, "BLOCK_G": power_of_two(TOPK_PROGRAMS), "NEED_LSE": True}
        yield Case(topk_merge_kernel, dtype, target, constants, warps)


def _large(kernel: Any, dtype: str, target: str, config: Config, constants: dict[str, Any]) -> Case:
    arguments = config.arguments()
    warps, stages = arguments.pop("num_warps"), arguments.pop("num_stages")
    return Case(kernel, dtype, target, arguments | constants, warps, stages)


def _tiles(names: str, sizes: tuple[int, ...]) -> dict[str, int]:
    return {f"BLOCK_{name}": size for name, size in zip(names, sizes, strict=True)}


def instructions(report: Report) -> str:
    """Return the names of the matrix instructions in the assembly."""
    found = [i for i in ("wgmma", "mma.sync", "v_mfma") if i in report.assembly]
    return " ".join(found) or "–"


def table() -> Iterator[str]:
    """Yield the lines of the table."""
    yield "| kernel | tiles | dtype | target | warps, stages | registers | spilled | shared memory, B | matrix instructions |"
    yield "|---|---|---|---|---|---:|---:|---:|---|"
    for target in TARGETS:
        for dtype in DTYPES:
            for case in cases(target, dtype):
                r = compile_case(case)
                yield (
                    f"| {case.name} | {case.tiles} | {dtype} | {target} | {case.warps}, {case.stages} "
                    f"| {r.registers} | {r.spilled} | {r.shared} | {instructions(r)} |"
                )


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    print(f"Triton {triton.__version__}\n")
    for line in table():
        print(line, flush=True)
