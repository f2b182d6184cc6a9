from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gistops.backends import native


@pytest.fixture
def cheap_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """C++ sources that compile in a second: the operators' schemas and no kernels."""
    monkeypatch.setenv("GISTOPS_CUDA", "0")
    src = tmp_path / "cheap_csrc"
    (src / "cpu").mkdir(parents=True)
    shutil.copy(native.source_dir() / "schema.cpp", src)
    for path in (native.source_dir() / "cpu").glob("*.cpp"):
        (src / "cpu" / path.name).write_text("namespace gistops {}\n")
    return src
