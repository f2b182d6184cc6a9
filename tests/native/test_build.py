"""The build: its tools, its messages about missing tools, and its outputs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gistops import _build, _toolchain, info
from gistops._toolchain import BuildError, Tools
from gistops.backends import native


def has_build_tools() -> bool:
    try:
        Tools.find()
    except BuildError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_build_tools(), reason="no C++ compiler or no ninja")


@pytest.fixture
def no_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No CXX, and nothing on PATH."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


@pytest.mark.skipif(
    not native.load().loaded and not has_build_tools(),
    reason="no compiler: the tests run on the reference backend",
)
def test_the_tests_run_on_compiled_operators() -> None:
    status = native.load()
    assert status.loaded, status.reason
    record = _build.Record.read(status.path)
    assert record is not None
    assert record.source_hash == _build.source_hash(native.source_dir())


# Messages about missing tools.


@pytest.mark.usefixtures("no_programs")
def test_no_compiler() -> None:
    with pytest.raises(BuildError, match=r"no C\+\+ compiler: CXX is not set.*install one"):
        _toolchain.find_compiler()


def test_invalid_cxx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-c++ -m64")
    with pytest.raises(
        BuildError, match=r"CXX: expected a C\+\+ compiler's command, got 'no-such-c\+\+ -m64'"
    ):
        _toolchain.find_compiler()


@pytest.mark.usefixtures("no_programs")
def test_cxx_with_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"{sys.executable} -a")
    assert _toolchain.find_compiler() == (sys.executable, "-a")


@pytest.mark.usefixtures("no_programs")
def test_no_ninja(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_toolchain.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BuildError, match=r"ninja.*`pip install ninja`"):
        _toolchain.find_ninja()


def test_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_toolchain, "_torch_folders", lambda: iter(()))
    with pytest.raises(BuildError, match=r"no torch is installed for .*`pip install torch`"):
        _toolchain.find_torch()


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("2.10.1", r"expected 2\.11 or newer, got 2\.10\.1"),
        ("2.99.0", r"torch 2\.99\.0: its C\+\+ header .* is missing"),
    ],
)
def test_unsuitable_torch(
    version: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '{version}'\n")
    monkeypatch.setattr(_toolchain, "_torch_folders", lambda: iter((tmp_path,)))
    with pytest.raises(BuildError, match=message):
        _toolchain.find_torch()


def test_torch_is_found_behind_build_isolation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_toolchain.importlib.util, "find_spec", lambda name: None)
    assert _toolchain.find_torch().version == torch.__version__


def test_missing_sources(tmp_path: Path) -> None:
    with pytest.raises(
        BuildError, match=r"C\+\+ sources are missing: schema\.cpp, cpu/binding/logits_ops\.cpp"
    ):
        _build.build(tmp_path, tmp_path / "_C.so", tmp_path)


# Outputs.


@needs_compiler
def test_a_compile_error_is_shown_with_its_command(cheap_sources: Path, tmp_path: Path) -> None:
    (cheap_sources / "cpu" / "binding" / "logits_ops.cpp").write_text("int f() { return no_such_name; }\n")
    with pytest.raises(BuildError) as caught:
        _build.build(cheap_sources, tmp_path / "_C.so", tmp_path / "objects")
    assert re.search(r"logits_ops\.cpp:1:\d+: error: .*no_such_name", str(caught.value))
    assert re.search(r"command: \S+ -std=c\+\+20 .*-c \S*logits_ops\.cpp", str(caught.value))
    assert len(str(caught.value)) < 3000


@needs_compiler
@pytest.mark.skipif(sys.platform == "darwin", reason="on macOS a missing function is an error of the load")
def test_a_missing_function_is_an_error_of_the_build(cheap_sources: Path, tmp_path: Path) -> None:
    (cheap_sources / "cpu" / "dispatch.cpp").write_text(
        "void nowhere_defined();\nvoid g() { nowhere_defined(); }\n"
    )
    with pytest.raises(BuildError, match=r"undefined reference to .*nowhere_defined"):
        _build.build(cheap_sources, tmp_path / "_C.so", tmp_path / "objects")


@needs_compiler
def test_special_characters_in_paths_record_and_incremental_build(
    cheap_sources: Path, tmp_path: Path
) -> None:
    out, objects = tmp_path / "with space" / "_C.so", tmp_path / "a$b: c's"
    record = _build.build(cheap_sources, out, objects)
    assert _build.Record.read(out) == record
    assert record.torch == torch.__version__
    assert record.source_hash == _build.source_hash(cheap_sources)
    built = {path.name: path.stat().st_mtime_ns for path in objects.glob("*.o")}
    assert len(built) == len(_build.units())
    (cheap_sources / "cpu" / "dispatch.cpp").write_text("namespace gistops { int x; }\n")
    _build.build(cheap_sources, out, objects)
    changed = {path.name for path in objects.glob("*.o") if path.stat().st_mtime_ns != built[path.name]}
    assert changed == {"cpu_dispatch.o"}


def test_hash_depends_on_sources_and_flags(cheap_sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _build.source_hash(cheap_sources)
    (cheap_sources / "notes.txt").write_text("not compiled")
    assert _build.source_hash(cheap_sources) == before
    (cheap_sources / "cpu" / "new.h").write_text("// a header\n")
    after = _build.source_hash(cheap_sources)
    assert after != before
    monkeypatch.setattr(_build, "compile_flags", lambda machine: ("-O0",))
    assert _build.source_hash(cheap_sources) != after


def test_kernels_include_nothing_from_outside_their_folder() -> None:
    folder = native.source_dir() / "cpu" / "isa"
    allowed = {path.name for path in folder.iterdir()}
    allowed |= {"cmath", "cstdint", "cstring", "limits", "utility", "immintrin.h", "arm_neon.h"}
    for path in folder.iterdir():
        included = re.findall(r'^#\s*include [<"](.*)[>"]', path.read_text(encoding="utf-8"), re.M)
        assert set(included) <= allowed, path.name


@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm, of binutils, is not on PATH")
def test_kernels_of_new_processors_have_no_weak_symbols(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The linker keeps one copy of a weak function; a v4 copy of std::max would crash an older machine."""
    checked = [unit for unit in _build.units() if "-march" in " ".join(unit.flags)]
    if not checked:
        pytest.skip(f"{_toolchain.host_machine()} has one variant of the kernels")
    tools = Tools.find()
    for unit in checked:
        obj = tmp_path / f"{unit.name}.o"
        source = native.source_dir() / unit.source
        flags = (*_build.compile_flags(), *unit.flags)
        subprocess.run([*tools.compiler, *flags, "-c", source, "-o", obj], check=True)
        listed = subprocess.run(["nm", "-C", obj], check=True, capture_output=True, text=True).stdout
        weak = [line for line in listed.splitlines() if re.match(r"[0-9a-f]+ [WVu] ", line)]
        assert not weak, f"{unit.name}: {weak[:5]}"
        assert re.search(r" [DRdr] ", listed), (
            f"{unit.name}: expected the table of kernels, got {listed[:500]}"
        )


# Reports.


def test_info_reports_versions_backends_and_folders() -> None:
    facts = info.info()
    assert facts["versions"]["torch, running"] == torch.__version__
    assert facts["backends"]["reference"]["available"]
    assert facts["backends"]["cpu"]["available"] == native.load().loaded
    text = info.render(facts)
    for word in (
        "gistops",
        "torch, built for",
        "compiler",
        "cache folder",
        str(native.cache_dir()),
        "instruction set",
        "float32 products",
        "bfloat16 products",
        "float16 products",
    ):
        assert word in text
    assert "last load error" in text


def test_info_reports_a_mismatch() -> None:
    note = info.mismatch("2.11.0", "2.13.0")
    assert note is not None
    assert "built for torch 2.11.0, you have 2.13.0" in note
    assert "pip install --force-reinstall" in note
    assert info.mismatch("2.13.0", "2.13.0") is None
    assert "built for torch 2.11.0" in info.render({**info.info(), "mismatch": note})


# The kernels for NVIDIA GPUs.

CUDA_TORCH = _toolchain.Torch(Path(torch.__file__).parent, "2.99.0+cu130", "13.0")


def test_reasons_for_a_missing_cuda_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = _toolchain.Torch(Path("/torch"), "2.99.0+cpu")
    assert _toolchain.find_cuda(cpu) == "torch 2.99.0+cpu is built without CUDA"
    monkeypatch.setattr(_toolchain, "find_nvcc", lambda: None)
    assert "nvcc was not found" in str(_toolchain.find_cuda(CUDA_TORCH))
    monkeypatch.setenv("GISTOPS_CUDA", "0")
    assert _toolchain.find_cuda(CUDA_TORCH) == "GISTOPS_CUDA=0 left them out"


def test_nvcc_of_another_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 12.4, V12.4.1\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(_toolchain, "find_nvcc", lambda: nvcc)
    found = str(_toolchain.find_cuda(CUDA_TORCH))
    assert found.endswith("from another version: release 12.4"), found


@pytest.mark.skipif(_toolchain.find_nvcc() is None, reason="nvcc is not installed")
def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = _toolchain.find_nvcc()
    assert nvcc is not None
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a 10.0+PTX")
    assert _toolchain._architectures(nvcc) == ("80", "90a", "100+PTX")
    flags = _toolchain.Cuda(nvcc, nvcc, ("80", "100+PTX")).flags()
    assert flags == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_100,code=[sm_100,compute_100]",
    ]
    assert "-DGISTOPS_SM90A=1" in _toolchain.Cuda(nvcc, nvcc, ("80", "90a")).flags()
    assert "-DGISTOPS_SM90A=1" not in _toolchain.Cuda(nvcc, nvcc, ("90", "90a")).flags()
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    assert _toolchain._architectures(nvcc) == ("80", "90a", "100+PTX")
    for wrong in ("7.5", "Hopper", "9"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wrong)
        with pytest.raises(BuildError, match=f"TORCH_CUDA_ARCH_LIST: expected .* got '{wrong}'"):
            _toolchain._architectures(nvcc)


def test_newer_gpus_get_code_from_an_nvcc_without_blackwell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """PTX of sm_90a runs on Hopper GPUs alone, so that the PTX for newer GPUs is that of sm_80."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf 'compute_80\\ncompute_86\\ncompute_90\\n'\n")
    nvcc.chmod(0o755)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert _toolchain._architectures(nvcc) == ("80+PTX", "90a")


@needs_compiler
@pytest.mark.skipif(_toolchain.find_nvcc() is None, reason="nvcc is not installed")
def test_cuda_kernels_that_do_not_compile(cheap_sources: Path, tmp_path: Path) -> None:
    """A build without them, with the reason in the record; an error if strict."""
    tools = Tools.find()
    nvcc = _toolchain.find_nvcc()
    assert nvcc is not None
    assert tools.cuda == "GISTOPS_CUDA=0 left them out" or "without CUDA" in str(tools.cuda)
    tools = replace(tools, cuda=_toolchain.Cuda(nvcc, tmp_path / "libcudart.so", ("90",)))
    (cheap_sources / "cuda").mkdir()
    for unit in _build.CUDA:
        (cheap_sources / unit.source).write_text("namespace gistops {}\n")
    (cheap_sources / "cuda" / "f64.cu").write_text("int f() { return no_such_name; }\n")
    out = tmp_path / "_C.so"
    with pytest.raises(BuildError, match="no_such_name"):
        _build.build(cheap_sources, out, tmp_path / "o", tools, strict=True)
    record = _build.build(cheap_sources, out, tmp_path / "o", tools)
    assert out.is_file()
    assert record.cuda.startswith("compiling them failed:")
    assert "no_such_name" in record.cuda
