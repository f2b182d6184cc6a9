"""COCO files: identifiers, categories and names, valid and invalid."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from train.data.errors import DataError
from train.data.sources.listing import Listing, read_listing

IMAGES = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}]
NOTES = [{"image_id": 1, "category_id": 5}, {"image_id": 2, "category_id": 3}]


def read(folder: Path, content: Any, trained: Listing | None = None) -> Listing:
    path = folder / "a.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return read_listing(str(path), trained=trained)


def coco(**changed: Any) -> dict[str, Any]:
    content = {"images": IMAGES, "annotations": NOTES, **changed}
    return {name: value for name, value in content.items() if value != "absent"}


@pytest.mark.parametrize("categories", ["absent", None, []])
def test_categories_may_be_missing(categories: object, tmp_path: Path) -> None:
    listing = read(tmp_path, coco(categories=categories))
    assert listing.labels == [1, 0]
    assert listing.classes.keys == [3, 5]
    assert listing.classes.names == ["3", "5"]


def test_ids_of_text_are_those_of_integers(tmp_path: Path) -> None:
    images = [
        {"id": "1", "file_name": "a.jpg"},
        {"id": 2.0, "file_name": "b.jpg"},
        {"id": "007", "file_name": "c.jpg"},
    ]
    notes = [
        {"image_id": 1, "category_id": "5"},
        {"image_id": "2", "category_id": 3},
        {"image_id": "007", "category_id": "x"},
    ]
    listing = read(
        tmp_path,
        coco(images=images, annotations=notes, categories=[{"id": 10}, {"id": "5"}, {"id": 3}, {"id": "x"}]),
    )
    assert listing.classes.keys == [3, 5, 10, "x"]
    assert listing.labels == [1, 0, 3]
    assert [file.name for file in listing.files] == ["a.jpg", "b.jpg", "c.jpg"]


def test_names_of_categories(tmp_path: Path) -> None:
    named = [{"id": 5, "name": "ant"}, {"id": 3, "name": "bee"}]
    assert read(tmp_path, coco(categories=named)).classes.names == ["bee", "ant"]
    for name in ("bee", None, "", 7):  # without a name of its own for each category, the ids name the classes
        listing = read(tmp_path, coco(categories=[{"id": 5, "name": name}, named[1]]))
        assert listing.classes.names == ["3", "5"]


def test_images_without_an_annotation_are_counted(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match=r"a\.json: left out 1 of 2 images without an annotation"):
        assert len(read(tmp_path, coco(annotations=NOTES[:1]))) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read(tmp_path, coco())) == 2


def test_a_category_that_the_training_list_lacks_is_named(tmp_path: Path) -> None:
    trained = read(tmp_path, coco())
    notes = [{"image_id": 1, "category_id": 4}, {"image_id": 2, "category_id": "x"}]
    with pytest.raises(
        DataError, match=r"a\.json: expected only classes of the training list, got the classes 4, x too"
    ):
        read(tmp_path, coco(annotations=notes), trained)


def image(**fields: Any) -> dict[str, Any]:
    return coco(images=[IMAGES[0], {"id": 2, "file_name": "b.jpg"} | fields])


def note(**fields: Any) -> dict[str, Any]:
    return coco(annotations=[NOTES[0], NOTES[1] | fields])


WRONG: list[tuple[Any, str]] = [
    ("{", ", line 1: expected JSON, got Expecting property name"),
    ("", ", line 1: expected JSON, got Expecting value"),
    ("[" * 100_000, ": expected COCO's format, got JSON with too many levels"),
    ('{"images": [{"id": ' + "1" * 5000 + "}]}", ": expected COCO's format, got Exceeds the limit"),
    ([1, 2], r": expected an object with images and annotations, got \[1, 2\]"),
    (coco(images="absent"), ": images: expected a list of objects, got nothing"),
    (coco(images={"1": "a.jpg"}), ': images: expected a list of objects, got {"1": "a.jpg"}'),
    (coco(images=["a.jpg"]), r': images\[0\]: expected an object, got "a.jpg"'),
    (coco(annotations="absent"), ": annotations: expected a list of objects, got nothing"),
    (coco(annotations=[]), ": expected at least one image, got none"),
    (image(id=1), r": images\[1\]\.id: expected one image of each id, got a second one of the id 1"),
    (image(id="1"), r": images\[1\]\.id: expected one image of each id, got a second one of the id 1"),
    (image(id=None), r": images\[1\]\.id: expected an integer or text, got nothing"),
    (image(id=True), r": images\[1\]\.id: expected an integer or text, got true"),
    (image(id=1.5), r": images\[1\]\.id: expected an integer or text, got 1\.5"),
    (image(id=[2]), r": images\[1\]\.id: expected an integer or text, got \[2\]"),
    (image(file_name=None), r": images\[1\]\.file_name: expected a path, got nothing"),
    (image(file_name=7), r": images\[1\]\.file_name: expected a path, got 7"),
    (image(file_name=""), r': images\[1\]\.file_name: expected a path, got ""'),
    (image(file_name="a\0b"), r": images\[1\]\.file_name: expected the path of a file, got 'a\\x00b'"),
    (image(file_name="\ud800"), r": images\[1\]\.file_name: expected the path of a file, got '\\ud800'"),
    (
        note(image_id=9),
        r": annotations\[1\]\.image_id: expected the id of an image, got 9, which no image has",
    ),
    (note(image_id=None), r": annotations\[1\]\.image_id: expected an integer or text, got nothing"),
    (note(category_id=None), r": annotations\[1\]\.category_id: expected an integer or text, got nothing"),
    (note(category_id={}), r": annotations\[1\]\.category_id: expected an integer or text, got {}"),
    (coco(categories=[{"name": "ant"}]), r": categories\[0\]\.id: expected an integer or text, got nothing"),
    (coco(categories=[{"id": 3}, {"id": "3"}]), r": categories\[1\]\.id: expected one category of each id"),
    (coco(categories={"3": "ant"}), ': categories: expected a list of objects, got {"3": "ant"}'),
]


@pytest.mark.parametrize(("content", "words"), WRONG, ids=[words[:50] for _, words in WRONG])
def test_invalid_files_name_the_field(content: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"^{tmp_path / 'a.json'}{words}") as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value)
