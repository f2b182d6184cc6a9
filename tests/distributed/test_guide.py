"""The Python blocks of docs/distributed.md, run as one program by torchrun with two processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.cpu
def test_the_program_of_the_guide_runs(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", guide, re.DOTALL | re.MULTILINE)
    assert len(blocks) > 5
    (tmp_path / "train.py").write_text("\n".join(blocks), encoding="utf-8")
    for rank, rows in enumerate(
        torch.randn(1_001, 512).tensor_split(8)
    ):  # checkpoints as those of Partial FC
        torch.save({"state_dict_softmax_fc": {"weight": rows}}, tmp_path / f"checkpoint_gpu_{rank}.pt")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",  # independent of the host name
        "--nproc-per-node=2",
        "train.py",
    ]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",  # independent of the host name
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
