"""The glyphs dataset. Most tests draw Latin letters with the fonts that matplotlib includes."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTFont
from PIL import Image

from train.__main__ import main
from train.data import load
from train.data.errors import DataError
from train.data.glyphs import dataset as glyphs
from train.data.glyphs.characters import character_frequencies, word_list
from train.data.glyphs.dataset import load_glyphs
from train.data.glyphs.drawing import SUPERSAMPLING, Variation, fit_to_square, render_ink
from train.data.glyphs.faces import FAMILIES, Face, check_coverage, find_faces, system_fonts
from train.data.glyphs.plan import Rule, plan_training, training_counts

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
LETTERS = {chr(ord("A") + i): 1000 // (i + 1) ** 2 + 1 for i in range(26)}
RULE = Rule(
    num_classes=26,
    largest=20,
    smallest=3,
    families={"train": ("DejaVu Sans", "STIXGeneral"), "val": ("cmtt10",), "test": ("DejaVu Serif",)},
    fewest_families=2,
)
SIZE = 16


def fonts(*prefixes: str) -> list[Path]:
    return sorted(file for file in FONTS.glob("*.ttf") if file.name.startswith(prefixes))


ALL = fonts("DejaVuSans", "STIXGeneral", "cmtt10", "DejaVuSerif")


def draw(
    cache: Path, files: list[Path] = ALL, rule: Rule = RULE, letters: dict[str, int] | None = None
) -> glyphs.Glyphs:
    return load_glyphs(SIZE, cache, letters or LETTERS, files, rule)


def same(a: glyphs.Glyphs, b: glyphs.Glyphs, *parts: str) -> bool:
    return all(
        np.array_equal(a.arrays[f"{xy}_{part}"], b.arrays[f"{xy}_{part}"]) for part in parts for xy in "xy"
    )


def test_a_missing_jieba_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    assert main(["doctor", "--recipe", "glyphs", "--cache", str(tmp_path)]) == 2
    assert "pip install jieba" in capsys.readouterr().err


def test_counts_follow_the_square_root_of_the_frequency() -> None:
    counts = training_counts([100, 25, 9, 1], dataclasses.replace(RULE, largest=40, smallest=5))
    assert counts.tolist() == [40, 20, 12, 5]  # the rule gives the last class 4


def test_classes_of_few_images_use_different_families(seed: int) -> None:
    class_faces = [{"a": [0, 1], "b": [2], "c": [3, 4, 5]}, {"b": [2], "c": [3, 4, 5]}] * 50
    plan = plan_training(np.full(100, 3), class_faces, seed)
    family = np.array(["a", "a", "b", "c", "c", "c"])[plan.faces].reshape(100, 3)
    assert all(set(row) == {"a", "b", "c"} for row in family[::2])
    assert all(set(row) == {"b", "c"} for row in family[1::2])  # only faces that draw the class
    assert set(plan.faces) == set(range(6))
    assert len(np.unique(plan.variations, axis=0)) == 300


def test_the_dataset_follows_its_rule(tmp_path: Path) -> None:
    made = draw(tmp_path)
    counts = np.bincount(made.arrays["y_train"])
    assert counts.tolist() == training_counts(list(LETTERS.values()), RULE).tolist()
    assert (counts[0], counts[-1]) == (20, 3)
    assert made.characters == list(LETTERS)
    for part in ("val", "test"):
        assert made.arrays[f"y_{part}"].tolist() == list(range(26))
    for part in ("train", "val", "test"):
        images = made.arrays[f"x_{part}"]
        assert images.dtype == np.uint8
        assert images.shape == (len(made.arrays[f"y_{part}"]), 1, SIZE, SIZE)
        assert (images.max((1, 2, 3)) > 150).all()
    # Undeformed images have the family's first face: for the test split, DejaVu Serif Bold.
    [face] = find_faces([FONTS / "DejaVuSerif-Bold.ttf"], ["DejaVu Serif"])
    for k, letter in enumerate(LETTERS):
        ink = render_ink(face.open(SUPERSAMPLING * SIZE), letter)
        assert ink is not None
        assert np.array_equal(made.arrays["x_test"][k, 0], fit_to_square(ink, SIZE, Variation()))


def test_training_images_do_not_depend_on_held_out_fonts(tmp_path: Path) -> None:
    """The training images have the same bits with other held-out fonts, so none of these is trained on."""
    swapped = dataclasses.replace(RULE, families=RULE.families | {"val": ("cmr10",), "test": ("cmss10",)})
    first = draw(tmp_path)
    other = draw(tmp_path, fonts("DejaVuSans", "STIXGeneral", "cmr10", "cmss10"), swapped)
    assert same(first, other, "train")
    assert not same(first, other, "test")
    assert not same(first, other, "val")


def test_the_bits_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = draw(tmp_path / "a")
    monkeypatch.setattr(glyphs, "BATCH", 7)  # small batches, so that two processes are used
    assert same(
        first, load_glyphs(SIZE, tmp_path / "b", LETTERS, ALL, RULE, workers=2), "train", "val", "test"
    )
    reseeded = draw(tmp_path / "a", rule=dataclasses.replace(RULE, seed=1))
    assert not same(first, reseeded, "train")
    assert same(first, reseeded, "val", "test")


def test_duplicate_faces_are_left_out(tmp_path: Path) -> None:
    shutil.copy(FONTS / "STIXGeneral.ttf", tmp_path / "again.ttf")
    first, twice = draw(tmp_path), draw(tmp_path, [*ALL, tmp_path / "again.ttf"])
    assert same(first, twice, "train", "val", "test")
    assert any(note.startswith("left out: 0 duplicate faces") for note in first.notes), first.notes
    assert any(note.startswith("left out: 1 duplicate faces") for note in twice.notes), twice.notes


def test_a_damaged_glyph_is_left_out(tmp_path: Path) -> None:
    """FreeType raises an error when it draws the glyph, not when it opens the font."""
    font = TTFont(FONTS / "DejaVuSans.ttf")
    start = font["loca"].locations[font.getGlyphID(font.getBestCmap()[ord("B")])]
    content = bytearray((FONTS / "DejaVuSans.ttf").read_bytes())
    position = font.reader.tables["glyf"].offset + start
    content[position : position + 2] = b"\x7f\xff"  # the number of contours
    (tmp_path / "damaged.ttf").write_bytes(content)
    [face] = find_faces([tmp_path / "damaged.ttf"], ["DejaVu Sans"])
    with pytest.raises(OSError, match="invalid outline"):
        render_ink(face.open(32), "B")
    covered = check_coverage(face, list("ABC"), 32)
    assert covered.present == [True, False, True]
    assert covered.num_blank == 1


def test_images_are_drawn_once(tmp_path: Path) -> None:
    files = [Path(shutil.copy(file, tmp_path)) for file in ALL]
    cache = tmp_path / "cache"
    first = draw(cache, files)
    times = {file: file.stat().st_mtime_ns for file in cache.rglob("*")}
    assert same(first, draw(cache, files), "train", "val", "test")
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*")} == times
    os.utime(files[0], (1, 1))  # possibly another font
    draw(cache, files)
    assert len(list(cache.iterdir())) == 2
    load_glyphs(SIZE + 1, cache, LETTERS, files, RULE)
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize(
    ("families", "letters", "words"),
    [
        (
            {"test": ("TW-Kai",)},
            "AB",
            "at least 1 of the font families TW-Kai for the split test, got none of TW-Kai.*apt install fonts-cns11643-kai",
        ),
        (
            {"train": ("DejaVu Sans", "Unifont")},
            "AB",
            "at least 2 of the font families DejaVu Sans, Unifont for the split train.*fonts-unifont",
        ),
        (
            {},
            "AB中",
            r"expected 2 or more font families per character for the split train, got fewer for 中 \(1 in all\)",
        ),
        (
            {"train": ("DejaVu Sans", "DejaVu Serif"), "test": ("STIXGeneral",)},
            "ABԚ",
            "1 or more font families per character for the split val",
        ),
    ],
)
def test_missing_fonts_are_named(
    families: dict[str, tuple[str, ...]], letters: str, words: str, tmp_path: Path
) -> None:
    rule = dataclasses.replace(RULE, families=RULE.families | families)
    with pytest.raises(DataError, match=words):
        draw(tmp_path, rule=rule, letters=dict.fromkeys(letters, 1))
    assert not list(tmp_path.iterdir())


def test_a_size_that_is_too_small(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--image-size: expected at least 8 for glyphs, got 7"):
        load_glyphs(7, tmp_path)


def test_the_doctor_and_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line works, here with letters in place of the 8,141 characters, which take minutes."""
    letters = functools.partial(load_glyphs, frequencies=LETTERS, fonts=ALL, rule=RULE)
    monkeypatch.setattr(load, "load_glyphs", letters)
    options = f"--recipe glyphs --num-classes 26 --image-size {SIZE} --cache {tmp_path / 'cache'}".split()
    options += ["--classes-per-batch", "26"]
    assert main(["doctor", *options]) == 0
    said = capsys.readouterr().out
    for words in (
        "glyphs: 26 classes, samples [1, 16, 16]",
        "font families, train: DejaVu Sans (8 faces), STIXGeneral (4 faces)",
        "font families, test: DejaVu Serif (4 faces)",
    ):
        assert words in said, said
    short = "--stage1-epochs 1 --stage2-epochs 1 --max-steps-per-epoch 1 --classes-per-batch 8 --methods gist"
    short += " --device cpu"
    assert main([*options, *short.split(), "--runs", str(tmp_path / "runs"), "--name", "r"]) == 0
    assert (tmp_path / "runs" / "r" / "model-gist.safetensors").is_file()


def _installed() -> list[Face]:
    faces = find_faces(system_fonts(), sum(FAMILIES.values(), ()))
    if absent := {family for part in FAMILIES.values() for family in part} - {face.family for face in faces}:
        pytest.skip(f"these fonts are not installed: {', '.join(sorted(absent))}")
    return faces


def test_chinese_characters_with_the_systems_fonts(tmp_path: Path) -> None:
    _installed()
    try:
        words = word_list()
    except DataError as error:
        pytest.skip(str(error))
    frequencies = character_frequencies(words, Rule().num_classes)
    few = dict(list(frequencies.items())[:: len(frequencies) // 12])
    made = load_glyphs(24, tmp_path, few)
    assert len(made.arrays["y_test"]) == len(few) * len(FAMILIES["test"])
    assert len(made.arrays["y_val"]) == len(few) * len(FAMILIES["val"])
    images = made.arrays["x_test"].reshape(len(few), len(FAMILIES["test"]), 24, 24)
    blurred = [[Image.fromarray(image).resize((8, 8)) for image in row] for row in images]
    flat = np.array([[np.asarray(image, float).ravel() for image in row] for row in blurred])
    flat -= flat.mean(2, keepdims=True)
    flat /= np.linalg.norm(flat, axis=2, keepdims=True)
    # Labels are right if a character is most similar to itself in another font. By chance 1 in 13 is.
    nearest = (flat[:, 0] @ flat[:, 1].T).argmax(1)
    assert (nearest == np.arange(len(few))).mean() > 0.6
