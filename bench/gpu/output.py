"""The files of a day: written aside and moved into place, again every half minute, so that a kill never costs more."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVERY = 30.0  # seconds between two writes at most
SOON = 2.0  # seconds between two writes at least
MOST = 15 << 20  # bytes of a file
SMALL = 1 << 20  # bytes of a file that goes into runs.tgz


def save(path: Path, content: str | bytes) -> None:
    """Write a file aside and move it into place, so that a reader, or a killed run, never has half of one.

    Aside is the folder's parent where that can be: only whole files ever lie in the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    folder = path.parent.parent
    if not os.access(folder, os.W_OK) or folder.stat().st_dev != path.parent.stat().st_dev:
        folder = path.parent
    with tempfile.NamedTemporaryFile("wb", dir=folder, prefix=f".{path.name}.", delete=False) as file:
        file.write(data)
    try:
        os.chmod(file.name, 0o644)  # a temporary file is its owner's alone
        os.replace(file.name, path)
    except BaseException:
        os.unlink(file.name)
        raise


def cut(text: str, most: int = MOST) -> str:
    """A log that fits: its beginning and its end."""
    if len(text) <= most:
        return text
    half = most // 2 - 100
    return f"{text[:half]}\n\n[... {len(text) - 2 * half} characters left out ...]\n\n{text[-half:]}"


class Logs:
    """Parts of one log file, each a file that a process writes into, put together under headings."""

    def __init__(self, scratch: Path) -> None:
        """Prepare; the parts lie in `scratch`."""
        self.scratch = scratch
        self.parts: dict[str, Path] = {}

    def part(self, name: str) -> Path:
        """The file that a process of this name writes."""
        path = self.scratch / f"{len(self.parts):03d}.{os.urandom(4).hex()}.log"
        path.touch()
        self.parts[name] = path
        return path

    def text(self) -> str:
        """All of them."""
        most = MOST // max(1, len(self.parts)) // 2  # characters may take more than a byte
        said = [
            f"===== {name}\n{cut(path.read_text(encoding='utf-8', errors='replace'), most)}\n"
            for name, path in list(self.parts.items())
        ]
        return "\n".join(said)


def packed(folder: Path) -> bytes:
    """A .tgz of the small files of a folder, newest first as long as they fit."""
    files = [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
    facts = sorted(((p, p.stat()) for p in files), key=lambda fact: -fact[1].st_mtime)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for path, fact in facts:
            if fact.st_size <= SMALL and out.tell() + fact.st_size < MOST:
                tar.add(path, path.relative_to(folder.parent), recursive=False)
    return out.getvalue()


class Output:
    """One folder of at most eight files."""

    def __init__(
        self, folder: Path, document: dict[str, Any], render: Callable[[dict[str, Any]], str]
    ) -> None:
        """Prepare.

        Args:
            folder: where the files go.
            document: result.json; it changes as the day goes on.
            render: the document as table.md.
        """
        self.folder, self.document, self.render = folder, document, render
        self._scratch = tempfile.TemporaryDirectory(prefix="bench-gpu-")
        self.scratch = Path(self._scratch.name)
        self.logs = {name: Logs(self.scratch) for name in ("build.log", "tests.log", "sanitize.log")}
        self.runs: Path | None = None  # the folder of the trainings
        self.texts: dict[str, str] = {}  # kernels.csv, ncu.csv
        self._lock = threading.Lock()
        self._written = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._again, daemon=True)

    def __enter__(self) -> Output:
        self.write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.write()
        self._scratch.cleanup()

    def _again(self) -> None:
        while not self._over.wait(EVERY):
            self.write()

    def changed(self) -> None:
        """Write, unless that was done a moment ago."""
        if time.monotonic() - self._written > SOON:
            self.write()

    def write(self) -> None:
        """Write all files anew. What cannot be written is noted in the document and ends nothing."""
        with self._lock:
            self._written = time.monotonic()
            files: dict[str, Callable[[], str | bytes]] = {
                name: logs.text for name, logs in self.logs.items() if logs.parts
            }
            files |= {name: (lambda text=text: cut(text)) for name, text in list(self.texts.items())}  # type: ignore[misc]
            if self.runs is not None and self.runs.is_dir():
                runs = self.runs
                files["runs.tgz"] = lambda: packed(runs)
            files["table.md"] = lambda: self.render(self.document)
            files["result.json"] = lambda: json.dumps(self.document, indent=1, ensure_ascii=False) + "\n"
            for name, made in files.items():
                self._save(name, made)

    def _save(self, name: str, made: Callable[[], str | bytes]) -> None:
        for left in (2, 1, 0):
            try:
                save(self.folder / name, made())
                return
            except Exception as error:  # another thread may be changing what is written
                if left == 0:
                    self.document.setdefault("not written", {})[name] = f"{type(error).__name__}: {error}"
                time.sleep(0.05)
