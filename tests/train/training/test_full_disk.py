"""Tests of storage that fails: one line that names the file and the reason, no half-written file, and a run that resumes."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from train.__main__ import main
from train.files import WriteError, append_line, write_atomically
from train.training.checkpoint import save_torch

SHORT = "--stage1-epochs 1 --stage2-epochs 1 --methods plain --device cpu --max-steps-per-epoch 2"


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Let writes beyond this size of a file fail, as writes to a full disk do; Python ignores the signal."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def without_privileges() -> Iterator[None]:
    """Give up the rights of root, which may write everywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_on_a_full_disk_says_so_and_resumes(
    image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        f"--recipe smoke --num-classes 5 --classes-per-batch 3 --data {image_file} --runs {tmp_path} --name r"
    )
    with file_limit(50_000):  # a checkpoint has 3 MB
        assert main([*words.split(), *SHORT.split()]) == 1
    message = capsys.readouterr().err
    expected = f"error: cannot write {tmp_path / 'r' / 'checkpoint.pt'}: File too large; "
    assert message.startswith(expected)
    assert len(message.splitlines()) == 1
    assert names(tmp_path / "r") == {".lock", "config.toml", "environment.json", "metrics.jsonl"}
    assert main([*words.split(), *SHORT.split(), "--resume"]) == 0
    assert {"checkpoint.pt", "model-plain.safetensors", "report.html"} <= names(tmp_path / "r")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(100_000)),
        lambda path: save_torch({"x": torch.zeros(100_000)}, path),
    ],
)
def test_a_file_that_does_not_fit_keeps_its_previous_content(write: object, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with file_limit(50_000), pytest.raises(WriteError, match=f"^{file}: File too large$"):
        write_atomically(file, write)  # type: ignore[arg-type]
    assert file.read_text() == "old"
    assert names(tmp_path) == {"file"}


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    append_line(file, "a" * 10)
    with file_limit(15), pytest.raises(WriteError, match=f"^{file}: "):
        append_line(file, "b" * 10)
    assert file.read_text() == "a" * 10 + "\n"
    append_line(file, "c")
    assert file.read_text() == "a" * 10 + "\nc\n"


def test_a_folder_of_runs_that_cannot_be_written_is_named_before_the_data_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # First as root, which imports modules that another user may not be able to read.
    (tmp_path / "file").touch()
    assert main(["--recipe", "smoke", "--runs", str(tmp_path / "file")]) == 2
    assert "error: --runs: expected a writable folder" in capsys.readouterr().err
    tmp_path.chmod(0o555)
    try:
        with without_privileges():
            assert main(["--recipe", "smoke", "--data", "nowhere.npz", "--runs", str(tmp_path / "new")]) == 2
    finally:
        tmp_path.chmod(0o755)
    message = capsys.readouterr().err
    assert message.startswith("error: --runs: expected a writable folder, got ")
    assert len(message.splitlines()) == 1
    assert names(tmp_path) == {"file"}
