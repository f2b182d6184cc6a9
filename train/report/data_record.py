"""`report.json`: what the page shows beside metrics.jsonl, namely facts on the data, names of classes and small images."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..data.dataset import Dataset

Record = dict[str, Any]
FILE = "report.json"
MAX_SIDE = 96  # pixels of the longer side of an image


def data_record(
    data: Dataset, results: list[Record], *, name: str, split_rule: str, **training: str | int
) -> Record:
    """Return the record, with the event "data".

    Args:
        data: the dataset on the CPU, whose test samples were analyzed.
        results: the results of the methods. The "examples" of their analysis name the test samples that are shown.
        name: what the user calls the data.
        split_rule: the rule of the groups of classes.
        training: the backbone and the seed of the training, if they are known.
    """
    return {
        "event": "data",
        "data": name,
        "samples": "images" if data.is_images else "features",
        "train": len(data.y_train),
        "validation": 0 if data.y_val is None else len(data.y_val),
        "test": len(data.y_test),
        "class_names": data.class_names,
        "split_rule": split_rule,
        "pairs": {result["method"]: _pairs(data, result) for result in results},
        **training,
    }


def read_data_record(folder: Path) -> list[Record]:
    """Return the record of a run's folder in a list, which is empty if the run is of an early version.

    Raises:
        OSError, ValueError: the file is damaged.
    """
    file = folder / FILE
    if not file.exists():
        return []
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if not isinstance(record, dict) or record.get("event") != "data":
        raise ValueError(f"{file}: expected the record of a run's data")
    return [record]


def _pairs(data: Dataset, result: Record) -> list[Record]:
    """Return each example with the image that was classified wrongly and an image of the class that it was taken for."""
    examples = result.get("analysis", {}).get("examples", [])  # results of early versions have none
    if not data.is_images or data.x_test.shape[1] not in (1, 3):
        return []
    return [
        example
        | {
            "image": thumbnail(data.x_test[example["sample"]]),
            "other image": _image_of_class(data, example["taken for"]),
        }
        for example in examples
    ]


def _image_of_class(data: Dataset, label: int) -> str:
    """Return the first training image of a class, or its first test image; an empty text if it has none."""
    for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        if len(found := (y == label).nonzero()):
            return thumbnail(x[int(found[0])])
    return ""


def thumbnail(image: Tensor) -> str:
    """Return an image [c, h, w] uint8 of one or three channels as a JPEG in base64, reduced to at most 96 pixels."""
    pixels = image.cpu().permute(1, 2, 0).squeeze(2) if len(image) == 1 else image.cpu().permute(1, 2, 0)
    picture = Image.fromarray(pixels.contiguous().numpy())
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88, subsampling=0)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
