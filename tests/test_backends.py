"""Tests of the choice of a backend, and of the reasons why a backend is not available."""

from __future__ import annotations

import sys

import pytest
import torch

import gistops
from gistops import BackendUnavailable, backends
from gistops.backends import native, triton
from gistops.operators import cross_entropy, cross_entropy_parts, logits, topk
from gistops.operators.registry import Op

x, w, delta, tau = torch.randn(3, 8), torch.randn(5, 8), torch.randn(2, 8), torch.tensor(16.0)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_the_cpu_is_served_by_the_compiled_operators() -> None:
    assert backends.choose("cpu", None) == "cpu"
    assert backends.why_not("cpu") is None
    assert backends.why_not("reference") is None


def test_a_backend_for_another_device_raises() -> None:
    with pytest.raises(ValueError, match="backend: 'cuda' serves tensors on 'cuda', got tensors on 'cpu'"):
        gistops.constellation_logits(x, w, delta, tau, backend="cuda")
    with pytest.raises(ValueError, match="backend: 'cpu' serves tensors on 'cpu', got tensors on 'cuda'"):
        backends.choose("cuda", "cpu")


@no_gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_an_unavailable_backend_raises_with_its_reason(name: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"backend: '{name}' is not available: .+"):
        backends.choose("cuda", name)
    if torch.version.cuda is None:
        assert "is built without CUDA; pytorch.org" in str(backends.why_not("cuda"))


def test_triton_on_the_cpu_names_its_interpreter() -> None:
    with pytest.raises(BackendUnavailable, match=r"TRITON_INTERPRET=1|Triton is not installed; `pip install"):
        gistops.constellation_logits(x, w, delta, tau, backend="triton")


def test_missing_triton_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    assert triton.why_not("cuda") == "Triton is not installed; `pip install triton` brings it (Linux)"


def test_a_library_without_cuda_kernels_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    status = native.Status(True, "", native.PACKAGE, cuda="nvcc was not found")
    monkeypatch.setattr(native, "load", lambda: status)
    assert str(native.why_not_cuda("cuda")).endswith("holds no CUDA kernels: nvcc was not found")


def test_an_old_gpu_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native, "load", lambda: native.Status(True, "", cuda="sm_80"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Turing")
    assert native.why_not_cuda("cuda") == (
        "its kernels need compute capability 8.0 or newer, got 7.5 (Turing)"
    )


@no_gpu
def test_the_reference_is_the_fallback_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(RuntimeWarning, match=r"no fused backend is available for 'cuda' \(cuda: .*; triton: "):
        assert backends.choose("cuda", None) == "reference"
    with pytest.warns(RuntimeWarning, match=r"for 'xpu' \(no backend supports it\)"):
        assert backends.choose("xpu", None) == "reference"


def test_the_python_schemas_are_those_of_the_library() -> None:
    modules = (logits, cross_entropy_parts, cross_entropy, topk)
    ops = [value for module in modules for value in vars(module).values() if isinstance(value, Op)]
    assert len(ops) == 14
    assert backends.why_not("cpu") is None  # loads the library
    for op in ops:
        compiled = getattr(torch.ops.gistops, op.name).default._schema
        assert torch._C.parse_schema(f"gistops::{op.schema()}") == compiled
        assert str(torch._C.parse_schema(f"gistops::{op.schema()}")) == str(compiled)


def test_importing_gistops_imports_no_triton() -> None:
    import subprocess

    code = "import sys, gistops; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tf32_follows_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert backends.allow_tf32("cuda") == (setting == "tf32")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
