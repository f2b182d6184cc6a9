"""Console output, and the words of messages."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import unicodedata
import warnings
from typing import Any

from rich.console import Console

#: Controls of the direction of text, which reorder the words around them.
DIRECTIONS = "\u200e\u200f\u202a-\u202e\u2066-\u2069"


class OutputConsole(Console):
    """A console whose reader may end early, such as `head`: rich would exit with code 1 and without a message."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def open_missing_streams() -> None:
    """Discard what is written to standard output or standard error if it is closed, as by `>&-`: Python has None there."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def open_console(*, quiet: bool) -> Console:
    """Return the console for standard output. A character that the terminal's encoding lacks is written out."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return OutputConsole(quiet=quiet)


def messages_of(console: Console, *, as_json: bool) -> Console:
    """Return the console for messages and warnings: standard error if standard output holds JSON."""
    if not as_json:
        return console
    messages = Console(stderr=True, quiet=console.quiet)
    warnings.showwarning = lambda message, *_: say(messages, f"warning: {message}")
    return messages


def print_json(value: dict[str, Any]) -> None:
    """Write an object to standard output in one line."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


def printable(text: str) -> str:
    r"""Return a text with its control characters and undecodable bytes written out, such as `\x1b` and `\n`.

    Names of files and classes may hold any character. None of these may move the cursor, color or hide other text, begin
    a line, or be impossible to encode.
    """
    if text.isprintable():
        return text
    return "".join(map(_written_out, text))


def _written_out(character: str) -> str:
    is_control = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
    is_noncharacter = (
        ord(character) & 0xFFFE == 0xFFFE or 0xFDD0 <= ord(character) <= 0xFDEF
    )  # not valid in HTML
    if is_control or is_noncharacter or re.match(f"[{DIRECTIONS}]", character):
        return character.encode("unicode_escape").decode()
    return character


def say(console: Console, line: str) -> None:
    """Print a line without colors or wrapping. Nothing in it is markup."""
    console.print(printable(line), highlight=False, soft_wrap=True, markup=False, emoji=False)


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a count and its noun, such as `1 class` and `2 classes`; the plural has an s if it is not given."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
