from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from gistops import _build
from gistops.backends import native

from .build import SANITIZED, build, load

CUDA = native.source_dir() / "cuda"
KERNELS = [native.source_dir() / unit.source for unit in _build.CUDA if unit.source.endswith(".cu")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if shutil.which("g++") is None:
        for item in items:
            item.add_marker(
                pytest.mark.skip(reason="g++, which compiles the kernels for the host, is not installed")
            )


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which compiled modules are kept between runs."""
    kept = getattr(request.config, "cache", None)
    return Path(kept.mkdir("host_cuda")) if kept else tmp_path_factory.mktemp("host_cuda")


@pytest.fixture(scope="session")
def module(cache: Path) -> ModuleType:
    """Load the CUDA kernels compiled for the host; in the process of `sanitized_pytest`, the sanitized ones."""
    if path := os.environ.get(SANITIZED):
        return load("gistops_host_kernels", Path(path))
    return load("gistops_host_kernels", build_kernels(cache, sanitize=False))


def build_kernels(cache: Path, sanitize: bool) -> Path:
    sources = [*KERNELS, Path(__file__).with_name("bindings.cpp")]
    return build("gistops_host_kernels", sources, [CUDA], sanitize, cache)
