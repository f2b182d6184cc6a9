"""What the binding (csrc/cuda/binding.h) calls of PyTorch."""

from __future__ import annotations

import re

import pytest
import torch

from gistops.backends import native

CALLS = re.findall(r'"(aten::\w+)", "(\w*)"', (native.source_dir() / "cuda/binding.h").read_text())


def test_some_calls_are_found() -> None:
    assert CALLS


@pytest.mark.parametrize(("name", "overload"), CALLS)
def test_autocast_leaves_what_is_called_alone(name: str, overload: str) -> None:
    """A backward inside an autocast region gets its product in the type that it asked for."""
    operator = f"{name}.{overload}" if overload else name
    assert torch._C._dispatch_has_kernel(operator), f"this torch has no {operator}"
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(operator, "AutocastCUDA")
