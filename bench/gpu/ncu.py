"""Nsight Compute over one step of a variant: the stall reasons and the utilization of each kernel."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from ..problem import Size, make_tensors
from .subprocesses import python_command, run_command

SECTIONS = ("SpeedOfLight", "WarpStateStats", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy")
KERNELS = 8  # at most; each is replayed dozens of times


def find() -> Path | None:
    """Find ncu on PATH, in CUDA's folder or in Nsight's folder."""
    if path := shutil.which("ncu"):
        return Path(path)
    places = (
        "/usr/local/cuda/bin/ncu",
        *sorted(map(str, Path("/opt/nvidia").glob("nsight-compute/*/ncu")), reverse=True),
    )
    return next((Path(place) for place in places if Path(place).is_file()), None)


def profile(
    program: Path, variant: str, kind: str, size: Size, seconds: float, log: Path
) -> tuple[str, dict[str, Any]]:
    """Run ncu and return its table and a report of the run."""
    asked = [
        str(program),
        "--clock-control",
        "none",
        "--csv",
        "--page",
        "details",
        "--launch-count",
        str(KERNELS),
    ]
    asked += ["--profile-from-start", "off", "--kernel-name", "regex:kernel|gistops"]
    for section in SECTIONS:
        asked += ["--section", section]
    text = f"{size.B}x{size.K}x{size.d}x{size.m}"
    done = run_command(asked + python_command("-m", "bench.gpu.ncu", variant, kind, text), seconds, log)
    lines = done.output.splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    report: dict[str, Any] = {"variant": variant, "kind": kind, "size": text, "seconds": done.seconds}
    if start is None:
        return "", report | {"not run": f"ncu printed no table: {done.tail(4)}"}
    return "\n".join(line for line in lines[start:] if line.startswith('"')) + "\n", report


def main() -> None:
    """Run one warm-up step and one profiled step."""
    import torch

    from .calls import make_call

    parser = argparse.ArgumentParser(prog="python -m bench.gpu.ncu", description=main.__doc__)
    parser.add_argument("variant")
    parser.add_argument("kind")
    parser.add_argument("size", type=Size.parse)
    options = parser.parse_args()
    run = make_call(options.variant, options.kind, make_tensors(options.size, torch.bfloat16, "cuda"), "bf16")
    run()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    run()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    main()
