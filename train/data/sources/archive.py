"""Reading of a few files from a tar archive that may be damaged or crafted."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO

from ..errors import DataError

MAX_MEMBER = 256 << 20  # bytes; the largest file of CIFAR's archives has 155 MB
MAX_HEADER = 1 << 20  # bytes that describe one file; CIFAR's archives have 512
MAX_TOTAL = 512 << 20  # bytes of the whole archive, decompressed; CIFAR's have 186 MB
MAX_COUNT = 1000  # files in the archive; CIFAR's have 9
PART = 1 << 20  # bytes per read


class _Bounded(io.RawIOBase):
    """A stream that refuses to be read beyond bounds: few bytes of a compressed archive can stand for gigabytes."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self.file = file
        self.allowed = MAX_HEADER  # bytes that may be read until this value is set again

    def read(self, size: int = -1) -> bytes:
        self.allowed -= size
        if size < 0 or self.allowed < 0:
            raise tarfile.ReadError("a header or a file that is larger than expected")
        content = self.file.read(size)
        self._check_position()
        return content

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset > MAX_TOTAL:
            raise tarfile.ReadError(f"more than {MAX_TOTAL:,} bytes")
        position = self.file.seek(offset)
        self._check_position()
        return position

    def tell(self) -> int:
        return self.file.tell()

    def _check_position(self) -> None:
        if self.file.tell() > MAX_TOTAL:
            raise tarfile.ReadError(f"more than {MAX_TOTAL:,} bytes")


def read_members(path: Path, is_wanted: Callable[[str], bool]) -> tuple[dict[str, bytes], list[str]]:
    """Read files of a tar archive, compressed by gzip or not. Nothing is written to the disk.

    The stream is read to its end, so that the checksum of a compressed archive is verified.

    Args:
        path: the archive.
        is_wanted: returns whether the content of a file is needed, given its name without a leading "./".

    Returns:
        The content of the files that are wanted, by name, and the names of all files.

    Raises:
        DataError: the archive is damaged, or has more or larger files than expected.
    """
    try:
        with open(path, "rb") as plain:
            is_compressed = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            if not is_compressed:
                return _read(_Bounded(plain), is_wanted)
            with gzip.open(plain) as file:
                return _read(_Bounded(file), is_wanted)  # type: ignore[arg-type]
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{path}: expected a readable tar archive, got {error}") from None


def _read(stream: _Bounded, is_wanted: Callable[[str], bool]) -> tuple[dict[str, bytes], list[str]]:
    contents: dict[str, bytes] = {}
    names: list[str] = []
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        while member := archive.next():
            if len(names) >= MAX_COUNT:
                raise tarfile.ReadError(f"more than {MAX_COUNT} files")
            name = str(PurePosixPath(member.name))
            names.append(name)
            # A link would name another file, and a sparse file may be larger than its content.
            if member.isreg() and not member.issparse() and is_wanted(name):
                if member.size > MAX_MEMBER:
                    expected = f"at most {MAX_MEMBER:,} bytes"
                    raise tarfile.ReadError(
                        f"{member.size:,} bytes in {name}, which has {expected} in CIFAR's archives"
                    )
                contents[name] = _content(archive, member, stream)
            stream.allowed = MAX_HEADER
    stream.allowed = 2 * MAX_TOTAL
    while stream.read(PART):
        pass
    return contents, names


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, stream: _Bounded) -> bytes:
    stream.allowed = 2 * MAX_MEMBER
    file = archive.extractfile(member)
    assert file is not None  # a regular file
    content = b"".join(iter(lambda: file.read(PART), b""))
    if len(content) < member.size:
        raise tarfile.ReadError(f"a part of {member.name} alone")
    return content
