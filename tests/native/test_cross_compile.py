"""The CPU code, compiled by Clang for the 64-bit Arm processors of Linux and macOS. Nothing is linked or run."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gistops import _build, _toolchain
from gistops.backends import native

from .test_build import needs_compiler

#: Zig's compiler for a target -> format and byte offset of the architecture in an object file, and aarch64's number.
TARGETS = {"aarch64-linux-gnu": ("<H", 18, 183), "aarch64-macos": ("<I", 4, 0x0100000C)}


def vector_multiply_adds(obj: Path) -> int:
    """Count NEON's multiply-adds: `fmla` on four floats or two doubles, by a vector or by one element of it."""
    code = obj.read_bytes()
    words = np.frombuffer(code[: len(code) // 4 * 4], dtype="<u4")
    by_vector = (words & 0xFFA0FC00) == 0x4E20CC00
    by_element = (words & 0xFF80F400) == 0x4F801000
    return int((by_vector | by_element).sum())


@pytest.mark.compile
@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
def test_aarch64(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ziglang", reason="the cross compiler is missing; `pip install ziglang` brings it")
    for name in ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "zig"))
    compiler = (sys.executable, "-m", "ziglang", "c++", "-target", target, "-Wall", "-Wextra", "-Werror")
    tools = _toolchain.Tools(
        _toolchain.find_torch(), compiler, _toolchain.find_ninja(), "not for this target", machine="aarch64"
    )
    _build._write_ninja(native.source_dir(), tmp_path / "_C.so", tmp_path, tools)
    objects = [tmp_path / f"{unit.name}.o" for unit in _build.units(machine=tools.machine)]
    done = subprocess.run(
        [tools.ninja, "-C", tmp_path, *objects], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, _build._explain(done.stdout)

    form, offset, number = TARGETS[target]
    assert {struct.unpack_from(form, obj.read_bytes(), offset)[0] for obj in objects} == {number}
    # Without -ffp-contract there would be none; Clang 20 and 22 write about 350 for either target.
    assert vector_multiply_adds(tmp_path / "cpu_kernels_baseline.o") > 100
