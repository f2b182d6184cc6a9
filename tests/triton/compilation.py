"""One ahead-of-time compilation: the kernel, its constants and the target; registers, spills and shared memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gistops.backends.triton import tile_tables

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TABLES: dict[str, tile_tables.Target] = {"sm_80": "ampere", "sm_90": "hopper", "gfx942": "amd"}
#: Maximum shared memory per block. The table of sm_80 also serves 8.6, 8.9 and 12.x, which have less.
SHARED = {"sm_80": 99 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
#: The dtype of the arguments, and how they are multiplied.
DTYPES: dict[str, tuple[str, tile_tables.Kind]] = {
    "bf16": ("bf16", "half"),
    "f16": ("fp16", "half"),
    "tf32": ("fp32", "tf32"),
    "f32": ("fp32", "ieee"),
    "f64": ("fp64", "f64"),
}
INTEGERS = (
    "B",
    "K",
    "d",
    "M",
    "m",
    "stride",
    "groups",
    "group_classes",
    "split_rows",
    "class_tiles",
    "grad_stride", "lse_stride", "first_class", "first_group", "group_tiles", "num_classes", "ignore_index", "splits", "programs",
    "row_stride", "class_stride", "k",
    "by_row_length", "moments_length", "bias_length", "margin_length", "coeffs_length", "tau_length",
    "row_tiles", "coeff_slots", "coeff_stride",
)  # fmt: skip
OPERANDS = (
    "input", "centers", "displacements", "weights", "vector_weights",
    "grad_centers", "grad_input", "grad_displacements",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One compilation."""

    kernel: Any
    dtype: str
    target: str
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    narrow: bool = False  # the logits and their gradient are in the dtype of the arguments

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    @property
    def tiles(self) -> str:
        sizes = [
            f"{k.removeprefix('BLOCK_')} {v}" for k, v in self.constants.items() if k.startswith("BLOCK_")
        ]
        sizes += [
            k.lower()
            for k in ("STASH", "SUMS", "PRODUCTS", "SCORED", "INTERLEAVED", "ROTATED", "ROUND")
            if self.constants.get(k)
        ]
        needs = [
            k.removeprefix("NEED_").lower() for k, v in self.constants.items() if k.startswith("NEED_") and v
        ]
        sizes += ["narrow"] if self.narrow else []
        return ", ".join([*sizes, *(["+".join(needs)] if needs else [])])

    @property
    def id(self) -> str:
        return f"{self.name}-{self.dtype}-{self.target}-{self.tiles}-{self.warps}x{self.stages}".replace(
            " ", ""
        )


@dataclass(frozen=True)
class Report:
    """The compilers' report of one case."""

    registers: int
    spilled: int  # bytes on the stack (NVIDIA), vector registers (AMD)
    shared: int
    assembly: str


def compile_case(case: Case, ones: bool = False) -> Report:
    """Compile a case as a launch would: pointers, d and stride are multiples of 16 (launch_args.py).

    Args:
        case: the kernel, its constants and the target.
        ones: set all sizes to 1, which Triton turns into constants.
    """
    operand, kind = DTYPES[case.dtype]
    total = "fp64" if kind == "f64" else "fp32"
    signature, attributes, constants = {}, {}, dict(case.constants)
    for index, parameter in enumerate(case.kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            continue
        types = {
            "products": f"*{total}",
            "slots": "*u8",
            "flags": "*i32",
            "tau": "*fp32",
            "target": "*i64",
            "lists": "*i64",
            "classes": "*i64",
            "in_range": "*i1",
        } | dict.fromkeys(INTEGERS, "i32")
        if case.narrow:
            types |= dict.fromkeys(("grad", "logits"), f"*{operand}")
        signature[name] = types.get(name, f"*{operand if name in OPERANDS else total}")
        aligned = name in ("d", "stride")
        if ones and name in INTEGERS and not aligned:
            signature[name] = "constexpr"
            constants[name] = 1
        elif aligned or name not in INTEGERS:
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, constants, attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    compiled = triton.compile(source, target=TARGETS[case.target], options=options)
    if case.target.startswith("sm"):
        registers, spilled = _resources(compiled.asm["cubin"])
        assembly = compiled.asm["ptx"]
    else:
        assembly = compiled.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"\.{field}: +(\d+)", assembly)[1])  # type: ignore[index]
            for field in ("vgpr_count", "vgpr_spill_count")
        )
    return Report(registers, spilled, compiled.metadata.shared, assembly)


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", str(file)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", output))
    return int(fields["REG"]), int(fields["STACK"]) + int(fields["LOCAL"])
