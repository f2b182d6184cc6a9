"""The programs of docs/examples run; each says in its first lines which packages it needs."""

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
    }


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, tmp_path: Path) -> None:
    found = re.search(r"Needs `pip install ([^`]+)`", path.read_text(encoding="utf-8"))
    for package in found[1].split() if found else ():
        try:
            pytest.importorskip(package)
        except RuntimeError as error:  # timm imports torchvision, which may not fit this torch
            pytest.skip(f"{package}: {error}")
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=dict(os.environ) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
