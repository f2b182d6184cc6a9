"""The small images of report.json: the confused test sample, beside a sample of the other class."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train.__main__ import main
from train.data.dataset import Dataset
from train.evaluation.confusions import examples
from train.report.data_record import MAX_SIDE, data_record, read_data_record, thumbnail
from train.report.differences import difference
from train.report.html import read_records

from .conftest import NAMES


def pixels(image: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(image)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(10, 20), (300, 100), (97, 1)])
def test_images_are_small(channels: int, size: tuple[int, int]) -> None:
    image = torch.full((channels, *size), 200, dtype=torch.uint8)
    shown = pixels(thumbnail(image))
    assert shown.mode == {1: "L", 3: "RGB"}[channels]
    assert max(shown.size) == min(MAX_SIDE, max(size))
    levels = shown.convert("L").getextrema()
    assert max(abs(level - 200) for level in levels) <= 2


def test_examples_are_the_most_confident_mistakes(images: Dataset) -> None:
    """Classes 3 and 4 are few-shot, with 20 test samples each."""
    predicted = images.y_test.clone()
    third, fourth = ((images.y_test == k).nonzero().flatten() for k in (3, 4))
    predicted[third[:6]], predicted[third[6:9]], predicted[fourth[:8]] = 1, 0, 2
    predicted[(images.y_test == 0).nonzero().flatten()] = 1  # many-shot
    confidence = torch.rand(len(predicted)) / 2
    confidence[third[4]] = confidence[fourth[7]] = 0.9
    found = examples(confidence, predicted, images, "standard")
    assert found == [
        {"class": 4, "taken for": 2, "count": 8, "of": 20, "sample": int(fourth[7])},
        {"class": 3, "taken for": 1, "count": 6, "of": 20, "sample": int(third[4])},
    ]
    result = {"method": "gist", "analysis": {"examples": found}}
    pairs = data_record(images, [result], name="x", split_rule="standard")["pairs"]["gist"]
    for pair, own, other in zip(pairs, (4, 3), (2, 1), strict=True):
        for shown, label in ((pair["image"], own), (pair["other image"], other)):
            expected = images.x_train[images.y_train == label].float().mean((0, 2, 3))
            color = torch.tensor(pixels(shown).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))
            assert (color - expected).abs().max() < 15


def test_features_have_no_images(features: Dataset) -> None:
    found = [{"class": 4, "taken for": 2, "count": 1, "of": 20, "sample": 0}]
    result = {"method": "gist", "analysis": {"examples": found}}
    record = data_record(features, [result], name="x", split_rule="standard")
    assert record["pairs"] == {"gist": []}


def test_a_run_writes_images_to_report_json_alone(trained_run: Path) -> None:
    record = json.loads((trained_run / "report.json").read_text())
    assert record["class_names"] == list(NAMES)
    shown = [pair["image"] for pairs in record["pairs"].values() for pair in pairs]
    assert shown
    assert all(pixels(image).size == (7, MAX_SIDE) for image in shown)  # of 10×130 pixels
    page, metrics = ((trained_run / name).read_text() for name in ("report.html", "metrics.jsonl"))
    for image in shown:
        assert f"data:image/jpeg;base64,{image}" in page
        assert image not in metrics


def test_the_stored_samples_have_the_accuracies_of_a_run(trained_run: Path) -> None:
    results = [record for record in read_records(trained_run) if record["event"] == "result"]
    for result in results:
        stored = np.frombuffer(base64.b64decode(result["analysis"]["correct"]), dtype=np.uint8)
        shares = np.unpackbits(stored, count=100).reshape(5, 20).mean(1)
        assert shares.tolist() == result["accuracy_per_class"]
    gap = difference(*results, same_samples=True)
    assert gap is not None
    assert gap.value == results[0]["accuracy"]["overall"] - results[1]["accuracy"]["overall"]


def test_the_page_of_an_evaluation_has_names_and_images(trained_run: Path, tmp_path: Path) -> None:
    model, data = trained_run / "model-plain.safetensors", trained_run.parent / "images.npz"
    assert main(["evaluate", str(model), "--data", str(data), "--out", str(tmp_path / "e")]) == 0
    trained, page = ((folder / "report.html").read_text() for folder in (trained_run, tmp_path / "e"))
    table = re.compile(r'<script type="application/json">(.*?)</script>')
    (found,), (expected,) = (map(json.loads, table.findall(text)) for text in (page, trained))
    assert found == expected | {"correct": expected["correct"][1:]}  # without the other method
    shown = re.findall('data:image/jpeg;base64,[^"]+', page)
    assert shown
    assert shown[0] in trained  # the mistaken test image; the other image is of the test split
    assert "Evaluated on" in page


@pytest.mark.parametrize("content", ["{}", "[", "", "[1]"])
def test_a_damaged_file_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match=r"report\.json: "):
        read_data_record(tmp_path)
