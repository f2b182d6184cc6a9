"""The files of a session. They are rewritten atomically every half minute, so that a killed run keeps its results."""

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

MAX_INTERVAL = 30.0  # seconds between two writes
MIN_INTERVAL = 2.0
MAX_BYTES = 15 << 20  # the largest size of a file
MAX_ARCHIVED_BYTES = 1 << 20  # the largest size of a file in runs.tgz


def save(path: Path, content: str | bytes) -> None:
    """Write a file atomically: a reader never sees a partial file, and a killed run never leaves one.

    The temporary file lies in the folder's parent if possible, so that the folder holds complete files alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    folder = path.parent.parent
    if not os.access(folder, os.W_OK) or folder.stat().st_dev != path.parent.stat().st_dev:
        folder = path.parent
    with tempfile.NamedTemporaryFile("wb", dir=folder, prefix=f".{path.name}.", delete=False) as file:
        file.write(data)
    try:
        os.chmod(file.name, 0o644)  # temporary files are readable by their owner alone
        os.replace(file.name, path)
    except BaseException:
        os.unlink(file.name)
        raise


def cut(text: str, most: int = MAX_BYTES) -> str:
    """Shorten a log to its beginning and its end."""
    if len(text) <= most:
        return text
    half = most // 2 - 100
    return f"{text[:half]}\n\n[... {len(text) - 2 * half} characters left out ...]\n\n{text[-half:]}"


class Logs:
    """A log file with a heading per part. A process writes each part into a file of its own."""

    def __init__(self, scratch: Path) -> None:
        """Create a log whose parts lie in `scratch`."""
        self.scratch = scratch
        self.parts: dict[str, Path] = {}

    def part(self, name: str) -> Path:
        """Return the file of a new part."""
        path = self.scratch / f"{len(self.parts):03d}.{os.urandom(4).hex()}.log"
        path.touch()
        self.parts[name] = path
        return path

    def text(self) -> str:
        """Join all parts."""
        most = MAX_BYTES // max(1, len(self.parts)) // 2  # characters may take more than a byte
        sections = [
            f"===== {name}\n{cut(path.read_text(encoding='utf-8', errors='replace'), most)}\n"
            for name, path in list(self.parts.items())
        ]
        return "\n".join(sections)


def pack(folder: Path) -> bytes:
    """Pack the small files of a folder into a .tgz, newest first, up to the size limit."""
    files = [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
    facts = sorted(((p, p.stat()) for p in files), key=lambda fact: -fact[1].st_mtime)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for path, fact in facts:
            if fact.st_size <= MAX_ARCHIVED_BYTES and out.tell() + fact.st_size < MAX_BYTES:
                tar.add(path, path.relative_to(folder.parent), recursive=False)
    return out.getvalue()


class Output:
    """The folder of a session's files, of which there are at most eight."""

    def __init__(
        self, folder: Path, document: dict[str, Any], render: Callable[[dict[str, Any]], str]
    ) -> None:
        """Prepare.

        Args:
            folder: folder of the files.
            document: content of result.json; it grows during the session.
            render: formats the document as table.md.
        """
        self.folder, self.document, self.render = folder, document, render
        self._scratch = tempfile.TemporaryDirectory(prefix="bench-gpu-")
        self.scratch = Path(self._scratch.name)
        self.logs = {name: Logs(self.scratch) for name in ("build.log", "tests.log", "sanitize.log")}
        self.runs: Path | None = None  # folder of the training runs
        self.texts: dict[str, str] = {}  # kernels.csv, ncu.csv
        self._lock = threading.Lock()
        self._written = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._write_periodically, daemon=True)

    def __enter__(self) -> Output:
        self.write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.write()
        self._scratch.cleanup()

    def _write_periodically(self) -> None:
        while not self._over.wait(MAX_INTERVAL):
            self.write()

    def changed(self) -> None:
        """Write the files unless they were written less than MIN_INTERVAL seconds ago."""
        if time.monotonic() - self._written > MIN_INTERVAL:
            self.write()

    def write(self) -> None:
        """Write all files. A file that cannot be written is noted in the document and raises nothing."""
        with self._lock:
            self._written = time.monotonic()
            files: dict[str, Callable[[], str | bytes]] = {
                name: logs.text for name, logs in self.logs.items() if logs.parts
            }
            files |= {name: (lambda text=text: cut(text)) for name, text in list(self.texts.items())}  # type: ignore[misc]
            if self.runs is not None and self.runs.is_dir():
                runs = self.runs
                files["runs.tgz"] = lambda: pack(runs)
            files["table.md"] = lambda: self.render(self.document)
            files["result.json"] = lambda: json.dumps(self.document, indent=1, ensure_ascii=False) + "\n"
            for name, content in files.items():
                self._save(name, content)

    def _save(self, name: str, content: Callable[[], str | bytes]) -> None:
        for left in (2, 1, 0):
            try:
                save(self.folder / name, content())
                return
            except Exception as error:  # another thread may change the document meanwhile
                if left == 0:
                    self.document.setdefault("not written", {})[name] = f"{type(error).__name__}: {error}"
                time.sleep(0.05)
