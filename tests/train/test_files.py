"""`train.files`."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from train.files import csv_writer, write_atomically


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_csv_of_any_text() -> None:
    """Python 3.10 refuses a null character by default, and Python 3.12 does not quote a carriage return."""
    file = io.StringIO(newline="")
    csv_writer(file).writerows(
        [
            ["a\0b", 'say "no"', "two\nlines"],
            ["back\\slash", "a, b", 0.5],
            [None, "\udcff", "дог"],
            ["a\rb", "\r\n"],
        ]
    )
    expected = 'a\0b,"say ""no""","two\nlines"\nback\\slash,"a, b",0.5\n,\udcff,дог\n"a\rb","\r\n"\n'
    assert file.getvalue() == expected
