"""Lines on the terminal: nothing in them is markup, and no character controls the terminal."""

from __future__ import annotations

import io

from rich.console import Console

from train.console import printable, say


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
