"""The programs of docs/examples run; each says in its first lines which packages it needs, and how many processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} >= {
        "plain_pytorch",
        "timm_model",
        "lightning_two_streams",
        "hugging_face",
        "fsdp2",
    }


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found = re.search(r"Needs `pip install ([^`]+)`", text)
    for package in found[1].split() if found else ():
        try:
            pytest.importorskip(package)
        except RuntimeError as error:  # timm imports torchvision, which may not fit this torch
            pytest.skip(f"{package}: {error}")
    launcher = [sys.executable]
    if processes := re.search(r"Run by `torchrun (--nproc-per-node=\d+)`", text):
        launcher += ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", processes[1]]
    done = subprocess.run(
        [*launcher, str(path)],
        cwd=tmp_path,
        env=dict(os.environ) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
