"""Tests of the source of csrc/cuda: the PyTorch operators that it calls, and code that some compilers reject."""

from __future__ import annotations

import re

import pytest
import torch

from gistops.backends import native

CALLS = re.findall(r'"(aten::\w+)", "(\w*)"', (native.source_dir() / "cuda/binding.h").read_text())


def test_calls_are_found() -> None:
    assert CALLS


@pytest.mark.parametrize(("name", "overload"), CALLS)
def test_autocast_has_no_rule_for_called_operators(name: str, overload: str) -> None:
    """A backward inside an autocast region gets its product in the type that it requests."""
    operator = f"{name}.{overload}" if overload else name
    assert torch._C._dispatch_has_kernel(operator), f"this torch has no {operator}"
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(operator, "AutocastCUDA")


def test_no_argument_is_an_unnamed_aggregate() -> None:
    """nvcc 13.0 with g++ 13.3 generates invalid C++ for arguments in braces in templates: aggregates must have names."""
    braces = re.compile(r"\w\(\{|, \{")
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for path in sorted((native.source_dir() / "cuda").glob("*.cuh"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if braces.search(line) and "asm" not in line and "mma" not in line
    ]
    assert not found, "\n".join(found)
