"""Lines on the terminal: nothing in them is markup, and no character controls the terminal."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from train.__main__ import main
from train.console import counted, printable, say


def said(line: str) -> str:
    file = io.StringIO()
    say(Console(file=file, force_terminal=True), line)
    return file.getvalue()


def test_a_line_is_printed_as_it_is() -> None:
    for line in (
        "[red]a[/red] [link=x]b :cat: $c$",
        "τ 16 – ‖δ‖ 美洲豹 é \u3000 \u00a0 👩\u200d🔬",
        "",
        "[/]",
    ):
        assert said(line) == f"{line}\n"


def test_controls_are_written_out() -> None:
    assert said("a\x1b[31mred\x1b]0;title\x07") == "a\\x1b[31mred\\x1b]0;title\\x07\n"
    assert said("a\nno problems\r\t\x00\x9b\u2028") == "a\\nno problems\\r\\t\\x00\\x9b\\u2028\n"
    assert said("\u202efdp.exe\u2069") == "\\u202efdp.exe\\u2069\n"
    assert printable("\udcff\ud800") == "\\udcff\\ud800"


def test_a_terminal_without_unicode() -> None:
    script = "from train.console import open_console, say; say(open_console(quiet=False), '豹 τ \\udcff')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("\\u8c79 \\u03c4 \\udcff\n", "")


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", "smoke", "--data", "no\x1b[31m\nwhere.npz"]) == 2
    expected = (
        r"error: --data: no\x1b[31m\nwhere.npz: expected an existing file, got none: the path does not exist"
    )
    assert capsys.readouterr().err.splitlines()[-1] == expected


@pytest.mark.parametrize(
    ("words", "codes"), [(["--help"], (1, 141)), (["doctor", "--recipe", "smoke", "--device", "cpu"], (141,))]
)
def test_output_that_nothing_reads(words: list[str], codes: tuple[int, ...]) -> None:
    """The end of a pipe is no error: `python -m train --help | head` prints no traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        command = [sys.executable, "-m", "train", *words]
        done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True)
    assert (done.returncode in codes, done.stderr) == (True, "")


def test_output_that_is_closed() -> None:
    """Python has no sys.stdout then, of which nothing in the driver is aware."""
    command = f"{sys.executable} -m train doctor --recipe smoke --device cpu >&-"
    done = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_counts_are_grammatical() -> None:
    assert [counted(n, "problem") for n in (0, 1, 2, 1234)] == [
        "0 problems",
        "1 problem",
        "2 problems",
        "1,234 problems",
    ]
    assert [counted(n, "class is", "classes are") for n in (1, 2)] == ["1 class is", "2 classes are"]
