"""Single image files: pixels of every kind become 8 bits, and an error of a decoder names the file."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.config import DataConfig
from train.data.errors import DataError
from train.data.load import load
from train.data.sources import image_files
from train.data.sources.image_files import UnreadableImage, decode

from ..conftest import COLORS


def png(depth: int, color: int, row: bytes, width: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG file with one row of samples, and chunks before its pixels."""
    header = struct.pack(">IIBBBBB", width, 1, depth, color, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    packed = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def tiff(bits: int, row: bytes, width: int, photometric: int = 1, sample_format: int = 1) -> bytes:
    """Return a TIFF file with one row of gray samples."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(row)}
    tags |= {339: sample_format}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in sorted(tags.items()))
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(row)) + row + directory


def pixels(content: bytes, path: Path) -> list[list[int]]:
    """Return the pixels of a file with one row of three pixels: the squares cut from its middle, one pixel wide."""
    path.write_bytes(content)
    with Image.open(path) as image:
        assert image.size == (3, 1)
        return np.asarray(image_files.read_rgb(image))[0].tolist()


def gray(*values: int) -> list[list[int]]:
    return [[value] * 3 for value in values]


WIDE = np.array([0, 33000, 65535], np.uint16)
MIDDLE = 128  # 33000 / 257 = 128.4


@pytest.mark.parametrize("kind", ["png", "tiff", "tiff big-endian", "pgm", "jpeg2000"])
def test_16_bits_are_scaled(kind: str, tmp_path: Path) -> None:
    if kind == "png":
        content = png(16, 0, WIDE.astype(">u2").tobytes(), 3)
    elif kind == "tiff":
        content = tiff(16, WIDE.astype("<u2").tobytes(), 3)
    elif kind == "pgm":
        content = b"P5 3 1 65535\n" + WIDE.astype(">u2").tobytes()
    else:
        buffer = io.BytesIO()
        if kind == "jpeg2000":
            Image.fromarray(WIDE[None]).save(buffer, "JPEG2000")
        else:
            Image.frombytes("I;16B", (3, 1), WIDE.astype(">u2").tobytes()).save(buffer, "TIFF")
        content = buffer.getvalue()
    assert pixels(content, tmp_path / "image") == gray(0, MIDDLE, 255)


def test_every_value_of_16_bits_is_rounded_to_the_nearest(tmp_path: Path) -> None:
    values = np.arange(65536, dtype=np.uint16)
    Image.fromarray(values.reshape(256, 256)).save(tmp_path / "all.png")
    image = decode(tmp_path / "all.png", 256).reshape(65536, 3)
    assert (image == np.rint(values / 257)[:, None]).all()


def test_a_run_gets_the_scaled_values(tmp_path: Path, cache: str) -> None:
    for part in ("train", "test"):
        for k in range(2):
            file = tmp_path / "set" / part / str(k) / "0.png"
            file.parent.mkdir(parents=True)
            Image.fromarray(np.full((20, 20), 10_000 + 40_000 * k, np.uint16)).save(file)
    data = load(DataConfig(data=str(tmp_path / "set"), image_size=8, cache=cache))
    assert data.x_train.flatten(1).float().mean(1).tolist() == [39, 195]


def test_other_depths_of_gray(tmp_path: Path) -> None:
    assert pixels(png(2, 0, b"\x1c", 3), tmp_path / "2.png") == gray(0, 85, 255)
    assert pixels(png(1, 0, b"\x60", 3), tmp_path / "1.png") == gray(0, 255, 255)
    assert pixels(b"P2 3 1 1023\n0 512 1023\n", tmp_path / "10.pgm") == gray(0, 128, 255)
    assert pixels(tiff(12, b"\x00\x08\x10\xff\xf0", 3), tmp_path / "12.tif") == gray(0, 129, 255)


def test_white_is_zero(tmp_path: Path) -> None:
    content = tiff(16, WIDE.astype("<u2").tobytes(), 3, photometric=0)
    assert pixels(content, tmp_path / "a.tif") == gray(255, 255 - MIDDLE, 0)
    assert pixels(tiff(8, b"\x00\x80\xff", 3, photometric=0), tmp_path / "b.tif") == gray(255, 127, 0)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (tiff(32, WIDE.astype("<u4").tobytes(), 3), "integers of more than 8 bits in TIFF"),
        (tiff(16, WIDE.astype("<u2").tobytes(), 3, sample_format=2), "integers of more than 8 bits in TIFF"),
        (tiff(32, WIDE.astype("<f4").tobytes(), 3, sample_format=3), "floating-point numbers in TIFF"),
        (b"Pf 3 1 -1.0\n" + WIDE.astype("<f4").tobytes(), "floating-point numbers in PPM"),
    ],
)
def test_an_unknown_range_is_refused(content: bytes, got: str, tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(
        UnreadableImage, match=rf"a\.tif: expected pixels of 8 bits.*, got {got}, whose range"
    ):
        decode(tmp_path / "a.tif", 1)


RED_CLEAR_HALF = [[255, 0, 0], [255, 255, 255], [255, 127, 127]]


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "PA"])
def test_transparency_is_drawn_on_white(mode: str, tmp_path: Path) -> None:
    colors = np.array([[[255, 0, 0, 255], [0, 0, 0, 0], [255, 0, 0, 128]]], np.uint8)
    path = tmp_path / "image.png"
    if mode == "RGBA":
        Image.fromarray(colors).save(path)
    elif mode == "LA":
        Image.fromarray(np.array([[[0, 255], [0, 0], [0, 128]]], np.uint8)).save(path)
    else:
        palette = Image.fromarray(np.array([[0, 1, 0]], np.uint8), "P")
        palette.putpalette([255, 0, 0, 0, 0, 0])
        if mode == "P":
            palette.putpixel((2, 0), 2)
            palette.putpalette([255, 0, 0, 0, 0, 0, 255, 0, 0])
            palette.save(path, transparency=bytes([255, 0, 128]))
        else:
            palette = palette.convert("PA")
            palette.putalpha(Image.fromarray(colors[..., 3]))
            path = tmp_path / "image.tif"
            palette.save(path)
    with Image.open(path) as image:
        drawn = np.asarray(image_files.read_rgb(image))[0].tolist()
    assert drawn == (gray(0, 255, 127) if mode == "LA" else RED_CLEAR_HALF)


def test_a_transparent_color_is_drawn_on_white(tmp_path: Path) -> None:
    """The color is given in the file's depth."""
    wide = WIDE.astype(">u2").tobytes()
    assert pixels(png(8, 0, b"\x09\x0a\xff", 3, (b"tRNS", b"\0\x09")), tmp_path / "8") == gray(255, 10, 255)
    assert pixels(png(4, 0, b"\x05\x90", 3, (b"tRNS", b"\0\x05")), tmp_path / "4") == gray(0, 255, 153)
    assert pixels(png(2, 0, b"\x1c", 3, (b"tRNS", b"\0\x01")), tmp_path / "2") == gray(0, 255, 255)
    assert pixels(png(16, 0, wide, 3, (b"tRNS", wide[2:4])), tmp_path / "16") == gray(0, 255, 255)
    color = bytes(range(10, 16))
    row = color + bytes(6) + color
    expected = [[255] * 3, [0] * 3, [255] * 3]
    assert pixels(png(16, 2, row, 3, (b"tRNS", color)), tmp_path / "rgb") == expected


def test_the_colors_of_other_modes(tmp_path: Path) -> None:
    red = Image.new("RGB", (30, 30), (254, 0, 0))
    for number, (mode, suffix) in enumerate(
        [("RGB", "jpg"), ("CMYK", "jpg"), ("CMYK", "tif"), ("YCbCr", "tif"), ("P", "gif"), ("RGB", "jfif")]
    ):
        path = tmp_path / f"{number}.{suffix}"
        red.convert(mode).save(path)
        assert np.abs(decode(path, 8).astype(int) - [254, 0, 0]).max() <= 3, (mode, suffix)


def turned(orientation: int) -> tuple[Image.Image, Image.Exif]:
    """Return an image with a red upper and a blue lower half, and metadata with this orientation and a resolution."""
    halves = np.repeat(np.array([[[255, 0, 0]], [[0, 0, 255]]], np.uint8), 20, 1).repeat(10, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x011A] = 1.0
    return Image.fromarray(halves), exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_orientations(orientation: int, suffix: str, tmp_path: Path) -> None:
    upper_left = {1: "red red", 2: "red red", 3: "blue blue", 4: "blue blue"}
    upper_left |= {5: "red blue", 6: "blue red", 7: "blue red", 8: "red blue"}
    image, exif = turned(orientation)
    path = tmp_path / f"a.{suffix}"
    image.save(path, exif=exif)
    found = decode(path, 20)
    names = ["red" if found[row, column, 0] > 128 else "blue" for row, column in ((5, 5), (5, 14))]
    assert " ".join(names) == upper_left[orientation]


def test_damaged_metadata_does_not_lose_an_image(tmp_path: Path) -> None:
    """The orientation is used if it can be read; otherwise the image stays as it is stored."""
    image, exif = turned(3)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    content, path = buffer.getvalue(), tmp_path / "a.jpg"
    resolution = struct.pack(">HHI", 0x011A, 5, 1)
    assert content.count(resolution) == 1
    minus_one = content.replace(resolution, struct.pack(">HHI", 0x011A, 10, 1))
    minus_one = minus_one.replace(struct.pack(">II", 1, 1), struct.pack(">iI", -1, 1))
    orientation = struct.pack(">HHI", 0x0112, 3, 1)
    words = content.replace(orientation, struct.pack(">HHI", 0x0112, 2, 1))  # text instead of a number
    cut = content.replace(b"Exif\0\0MM", b"Exif\0\0M?")
    for changed, is_turned in ((content, True), (minus_one, True), (words, False), (cut, False)):
        path.write_bytes(changed)
        upper = decode(path, 20)[3, 10]
        assert (upper[2] > 128) == is_turned


def test_the_errors_of_every_decoder_are_those_of_the_file(tmp_path: Path, cache: str) -> None:
    """Damaged tags of TIFF raise TypeError, struct.error and others inside the decoder."""
    good = tiff(16, WIDE.astype("<u2").tobytes(), 3)
    damaged, words = {}, []
    for position in range(8, len(good)):
        for value in (0, 1, 2, 7, 255):
            path = tmp_path / "set" / "train" / "a" / "x.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(good[:position] + bytes([value]) + good[position + 1 :])
            try:
                assert decode(path, 1).shape == (1, 1, 3)
            except UnreadableImage as error:
                words.append(str(error))
                damaged[type(error.__context__)] = path.read_bytes()
    assert all(line.startswith(f"{path}: ") for line in words)
    others = [kind for kind in damaged if not issubclass(kind, (OSError, ValueError, SyntaxError))]
    assert others, "no error of another kind"
    for part in ("train", "test"):
        for k, color in enumerate(COLORS.values()):
            file = tmp_path / "set" / part / "ab"[k % 2] / f"{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9), color).save(file)
    path.write_bytes(damaged[others[0]])
    source = DataConfig(data=str(tmp_path / "set"), image_size=8, cache=cache)
    with pytest.raises(DataError, match=r"got 1 of 4 images of the train split .* read: .*x\.tif: "):
        load(source)


def test_pixels_do_not_depend_on_the_filters_of_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow warns about images that are large, but not refused."""
    Image.new("RGB", (40, 40), (9, 9, 9)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(tmp_path / "a.png", 8).mean() == 9
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(UnreadableImage, match=r"a\.png: DecompressionBombError Image size \(1600 pixels\)"):
        decode(tmp_path / "a.png", 8)


def test_postscript_is_not_run(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(UnreadableImage, match=r"a\.png: cannot identify image file"):
        decode(tmp_path / "a.png", 8)
    assert not {".eps", ".ps"} & image_files.SUFFIXES
    assert {".jfif", ".jpe", ".png", ".webp", ".jp2", ".mpo"} <= image_files.SUFFIXES


def test_too_little_memory_is_not_the_files_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(image_files, "read_rgb", full)
    with pytest.raises(DataError, match=r"a\.png: expected memory to decode the image") as caught:
        decode(tmp_path / "a.png", 8)
    assert not isinstance(caught.value, UnreadableImage)
