from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gistops import _build
from gistops.backends import native

CPU_MULTIPLIES = """
#include <torch/csrc/stable/library.h>

static bool cpu_multiplies(torch::headeronly::ScalarType) { return false; }

STABLE_TORCH_LIBRARY_IMPL(gistops, CompositeExplicitAutograd, m) { m.impl("cpu_multiplies", TORCH_BOX(&cpu_multiplies)); }
"""


@pytest.fixture
def cheap_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """C++ sources that compile in a second: the schemas of the ops, and no kernel but the one that loading calls."""
    monkeypatch.setenv("GISTOPS_CUDA", "0")
    src = tmp_path / "cheap_csrc"
    for unit in _build.units():
        (src / unit.source).parent.mkdir(parents=True, exist_ok=True)
        (src / unit.source).write_text("namespace gistops {}\n")
    shutil.copy(native.source_dir() / "schema.cpp", src)
    (src / "cpu" / "binding" / "logits_ops.cpp").write_text(CPU_MULTIPLIES)
    return src
