"""What a measurement was made on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def processor() -> str:
    """The CPU's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    model = fields.get("model name") or platform.processor() or platform.machine()
    family = f" (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else ""
    return model + family


def hardware() -> str:
    """The CPU and its threads, the GPU if there is one, and versions, in a line."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{processor()}, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()}"
    )
