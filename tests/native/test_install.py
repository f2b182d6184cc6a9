"""Tests of `pip install .` in new environments. They take minutes; .ci/run runs them with `pytest -m install`.

The new environments link to the torch of the environment that runs the tests. Everything else in them is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from PIL import Image

from gistops.backends import native

from .test_build import needs_compiler

pytestmark = pytest.mark.install
REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = ("csrc", "gistops", "train", "setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md")
NOT_LINKED = ("gistops", "train", "ninja", "pip", "setuptools", "_distutils", "distutils", "__editable__")
UNSET = ("CXX", "GISTOPS_BUILD", "GISTOPS_JIT", "PYTHONPATH", "VIRTUAL_ENV")

USE = """
import warnings; warnings.simplefilter("ignore")
import torch, gistops
from gistops.backends import choose, native
torch.manual_seed(0)
logits = gistops.constellation_logits(torch.randn(5, 7), torch.randn(3, 7), torch.randn(2, 7), 16.0)
assert logits.shape == (5, 3) and logits.isfinite().all()
print(choose("cpu", None), native.load().origin, native.PACKAGE, sep="|")
"""


class Environment:
    """A new virtual environment, and a copy of the repository to install into it."""

    def __init__(self, root: Path, with_torch: bool = True) -> None:
        self.root = root
        venv.create(root / "venv", with_pip=True)
        self.python = root / "venv" / "bin" / "python"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.site = root / "venv" / "lib" / version / "site-packages"
        if with_torch:
            self.link_torch()
        self.source = root / "source"
        self.source.mkdir()
        for name in SHIPPED:
            ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
            if (REPOSITORY / name).is_dir():
                shutil.copytree(REPOSITORY / name, self.source / name, ignore=ignore)
            else:
                shutil.copy(REPOSITORY / name, self.source / name)

    def link_torch(self) -> None:
        """Link the packages of the running environment, torch and its dependencies among them, into this environment."""
        for entry in Path(torch.__file__).parents[1].iterdir():
            if not entry.name.startswith(NOT_LINKED) and not (self.site / entry.name).exists():
                (self.site / entry.name).symlink_to(entry)

    def start(self, *arguments: str, cwd: Path | None = None, **changes: str | None) -> subprocess.Popen[str]:
        env: dict[str, str | None] = {
            **os.environ,
            **dict.fromkeys(UNSET),
            "GISTOPS_CACHE": str(self.root / "cache"),
        }
        env.update(changes)
        return subprocess.Popen(
            [str(self.python), *arguments],
            env={name: value for name, value in env.items() if value is not None},
            cwd=cwd or self.root,  # outside the repository, so that the installed package is imported
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(
        self, *arguments: str, fails: bool = False, cwd: Path | None = None, **changes: str | None
    ) -> str:
        process = self.start(*arguments, cwd=cwd, **changes)
        output, _ = process.communicate(timeout=600)
        assert (process.returncode != 0) == fails, output
        return output

    def install(self, *options: str, fails: bool = False, **changes: str | None) -> str:
        command = ("-m", "pip", "install", "--verbose", *options, str(self.source))
        return self.run(*command, fails=fails, **changes)

    def use(self, **changes: str | None) -> list[str]:
        return self.run("-c", USE, **changes).splitlines()[-1].split("|")


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


@pytest.fixture
def nowhere(tmp_path: Path) -> str:
    """A PATH without a compiler."""
    (tmp_path / "empty").mkdir()
    return str(tmp_path / "empty")


@needs_compiler
def test_with_a_compiler(environment: Environment) -> None:
    stale = environment.source / "build" / "lib" / "gistops"
    stale.mkdir(parents=True)
    (stale / native.LIBRARY).write_text("stale")
    (stale / "removed.py").write_text("stale")
    (environment.source / "gistops" / native.LIBRARY).write_text("stale")

    output = environment.install(GISTOPS_BUILD="1")
    assert f"operators compiled for torch {torch.__version__}" in output
    assert re.search(r"filename=gistops-\S+-py3-none-(?!any)", output)
    assert environment.use(GISTOPS_JIT="0") == ["cpu", "install", str(environment.site / "gistops")]
    installed = {
        p.relative_to(environment.site).as_posix() for p in (environment.site / "gistops").rglob("*")
    }
    assert {"gistops/_C.so", "gistops/_C.json", "gistops/csrc/schema.cpp", "gistops/py.typed"} <= installed
    assert "gistops/removed.py" not in installed

    said = environment.run("-m", "gistops.info")
    assert f"compiled at install: {environment.site / 'gistops' / native.LIBRARY}" in said
    assert torch.__version__ in said


@pytest.mark.parametrize("options", [(), ("--editable",)], ids=["installed", "editable"])
def test_the_driver_is_a_part_of_gistops(options: tuple[str, ...], environment: Environment) -> None:
    stale = environment.source / "build" / "lib" / "train"
    stale.mkdir(parents=True)
    (stale / "__init__.py").write_text("stale")

    environment.install(*options, GISTOPS_BUILD="0")
    assert "No module named 'train'" in environment.run("-c", "import train", fails=True)
    assert not (environment.site / "train").exists()
    script = environment.run(str(environment.python.with_name("gistops-train")), "--help")
    assert "usage: gistops-train" in script
    module = environment.run("-m", "gistops.train", "doctor", "--help")
    assert "usage: python -m gistops.train doctor" in module
    # Recipes, the dataset and the page of the report are in the package.
    backend = ("--backend", "reference", "--device", "cpu", "--threads", "1")
    environment.run("-m", "gistops.train", "--recipe", "smoke", *backend)
    assert (environment.root / "runs" / "smoke" / "report.html").is_file()
    # Spawned processes decode images; they import the driver by the name that it has here.
    for name, count in (("train/ant", 40), ("train/bee", 40), ("val/ant", 1), ("val/bee", 1)):
        (environment.root / "set" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (250, 10, i)).save(environment.root / "set" / name / f"{i}.png")
    words = (
        "--recipe",
        "smoke",
        "--data",
        "set",
        "--num-classes",
        "2",
        "--classes-per-batch",
        "2",
        "--cache",
        "decoded",
    )
    assert "no problems" in environment.run("-m", "gistops.train", "doctor", *words)
    checkout = environment.run("-m", "train", "--help", cwd=environment.source)
    assert "usage: python -m train" in checkout


def test_without_a_compiler(environment: Environment, nowhere: str) -> None:
    output = environment.install(PATH=nowhere)
    assert "not compiled now, but on first use: no C++ compiler" in output
    assert re.search(r"filename=gistops-\S+-py3-none-any\.whl", output)
    backend, _, package = environment.use(PATH=nowhere)
    assert (backend, package) == ("reference", str(environment.site / "gistops"))
    said = environment.run("-m", "gistops.info", PATH=nowhere)
    assert "no C++ compiler: CXX is not set, and none of c++, g++, clang++ is on PATH; install one" in said

    output = environment.install(PATH=nowhere, GISTOPS_BUILD="1", fails=True)
    assert "GISTOPS_BUILD=1, but no C++ compiler" in output


@needs_compiler
def test_torch_comes_later_and_two_processes_compile_at_once(tmp_path: Path) -> None:
    environment = Environment(tmp_path, with_torch=False)
    output = environment.install("--no-deps")
    assert "not compiled now, but on first use: no torch is installed" in output
    environment.link_torch()
    environment.run("-m", "pip", "install", "ninja")  # a dependency, which --no-deps left out
    both = [environment.start("-c", USE) for _ in range(2)]
    said = [process.communicate(timeout=600)[0] for process in both]
    expected = f"cpu|first use|{environment.site / 'gistops'}"
    assert [text.splitlines()[-1] for text in said] == [expected, expected], said
    assert sum(text.count("gistops: compiling") for text in said) == 1


@needs_compiler
def test_editable(environment: Environment) -> None:
    environment.install("--editable")
    assert environment.use() == ["cpu", "first use", str(environment.source / "gistops")]
