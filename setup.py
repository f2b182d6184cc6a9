"""Installs the folder `train` as `gistops.train`, and compiles the operators if possible.

torch is not a build requirement: pip would download a second torch of several gigabytes and compile against the wrong
version. `gistops/_build.py` finds the installed torch instead. The environment variable GISTOPS_BUILD is one of

    auto (default)  compile; if that fails, the install succeeds and the first use compiles
    1               compile; a failure is an error
    0               do not compile

The kernels for NVIDIA GPUs are compiled as well if torch has CUDA and nvcc is found. GISTOPS_CUDA=0 leaves them out.
"""

import os
import shutil
import sys
import types
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

# `import gistops` would import torch, which an isolated build cannot see. This empty package stands in for it.
package = types.ModuleType("gistops")
package.__path__ = [str(ROOT / "gistops")]
sys.modules["gistops"] = package
from gistops import _build  # noqa: E402
from gistops._toolchain import BuildError  # noqa: E402


class GistopsDistribution(Distribution):
    """A distribution that is bound to a platform only once native code has been compiled."""

    compiled = False

    def has_ext_modules(self):
        return self.compiled


class BuildPackage(build_py):
    """Copies the Python files and the C++ sources, which a build on first use needs, and compiles."""

    def run(self):
        if (
            self.editable_mode
        ):  # the package is the source folder, where edited sources are compiled on first use
            return super().run()
        for name in ("gistops", "train"):  # files of an earlier build must not be shipped
            shutil.rmtree(Path(self.build_lib, name), ignore_errors=True)
        super().run()
        built = Path(self.build_lib, "gistops")
        for path in _build.sources(ROOT / "csrc"):
            target = built / "csrc" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(ROOT / "csrc" / path), str(target))
        self.compile_operators(built / "_C.so")

    def compile_operators(self, out):
        wanted = os.environ.get("GISTOPS_BUILD", "auto")
        if wanted not in ("auto", "0", "1"):
            raise SystemExit(f"GISTOPS_BUILD: expected auto, 0 or 1, got {wanted!r}")
        if wanted == "0":
            return print("gistops: GISTOPS_BUILD=0, the operators are not compiled now", file=sys.stderr)
        temporary = Path(self.get_finalized_command("build").build_temp, "gistops")
        try:
            record = _build.build(ROOT / "csrc", out, temporary, strict=wanted == "1")
        except BuildError as error:
            if wanted == "1":
                raise SystemExit(f"gistops: GISTOPS_BUILD=1, but {error}") from error
            print(f"gistops: the operators are not compiled now, but on first use: {error}", file=sys.stderr)
        else:
            self.distribution.compiled = True
            print(
                f"gistops: operators compiled for torch {record.torch} by {record.compiler}; CUDA: {record.cuda}",
                file=sys.stderr,
            )


class Wheel(bdist_wheel):
    """A wheel for any Python, and for this platform alone if it holds native code."""

    def run(self):
        self.run_command("build")
        self.root_is_pure = not self.distribution.compiled
        super().run()

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2] if self.distribution.compiled else "any")


DRIVER = find_packages(str(ROOT), include=["train", "train.*"])

setup(
    # A top-level package `train` would collide with the train.py of users, so the driver is a part of gistops.
    packages=find_packages(str(ROOT), include=["gistops", "gistops.*"])
    + [f"gistops.{name}" for name in DRIVER],
    package_dir={"gistops.train": "train"},
    distclass=GistopsDistribution,
    cmdclass={"build_py": BuildPackage, "bdist_wheel": Wheel},
)
