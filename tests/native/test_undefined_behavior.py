"""The exponential of the CPU kernels under UndefinedBehaviorSanitizer, for scores of any size."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from gistops.backends import native

PROGRAM = """
#include <cstdio>
#include "isa/softmax.h"

template <class T>
int wrong(T largest) {
  constexpr T kInf = std::numeric_limits<T>::infinity();
  // Lanes whose result is discarded hold -inf or differences as large as the type has.
  const T z[] = {0, -largest, 1, -kInf, -largest / 2, -1e4, -100, -88, -87, -709, -708, -1, -kInf};
  constexpr int n = sizeof(z) / sizeof(T);
  T max = -kInf, grad[n];
  double sum = 0;
  update_logsumexp<T>(z, 1, n, nullptr, &max, &sum);
  const T lse = max + std::log(static_cast<T>(sum)), one = 1;
  softmax_grad<T>(z, 1, n, {nullptr, nullptr}, {&lse, &one, nullptr}, grad, nullptr);
  double total = 0;
  for (const T g : grad) total += g;
  const double expected = 1 + std::exp(-1.0) + std::exp(-2.0);
  return !(std::abs(sum - expected) < 1e-6) + !(std::abs(total - 1) < 1e-6);
}

int main() {
  const int found = wrong<float>(3e38f) + wrong<double>(1e308);
  std::printf("%d wrong\\n", found);
  return found;
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.parametrize("flags", [(), ("-mavx2", "-mfma")], ids=["baseline", "avx2"])
def test_exponentials(flags: tuple[str, ...], tmp_path: Path) -> None:
    source, program = tmp_path / "main.cpp", tmp_path / "main"
    source.write_text(PROGRAM, encoding="utf-8")
    command = ["g++", "-std=c++20", "-O1", *flags, "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    command += ["-I", str(native.source_dir() / "cpu"), str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    if flags and "avx2" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        pytest.skip("this processor has no AVX2")
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
