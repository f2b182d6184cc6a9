"""Tests of `train.load`, `train.fit` and of the command `predict`, with a model that was trained in a few steps."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import train
from train.__main__ import main
from train.cli import parse_run
from train.config import ConfigError
from train.data.dataset import Dataset
from train.data.sources.image_files import decode
from train.model.model import load_model, save_model
from train.recipes import configure
from train.trained import describe
from train.training.trainer import Trainer

from .conftest import REPOSITORY, write_image
from .short_runs import FEATURES, IMAGES, finish


def save_trained(config: Any, data: Dataset, file: Path, method: str = "gist") -> Path:
    short = config.replace(stage2_epochs=1, max_steps_per_epoch=2)
    trainer = Trainer(method, short, data)
    finish(trainer)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_model(file, trainer.model, data.class_names, describe(method, short, data))
    return file


@pytest.fixture
def model_file(images: Dataset, tmp_path: Path) -> Path:
    return save_trained(IMAGES, images, tmp_path / "runs" / "birds" / "model-gist.safetensors")


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    colors = [(250, 10, 10), (10, 250, 10), (40, 90, 120)]
    places = ("a.png", "deep/b.jpg", "deep/er/c.bmp")
    return [write_image(tmp_path / "photos" / place, c) for place, c in zip(places, colors, strict=True)]


def expected_probabilities(model_file: Path, files: list[Path]) -> torch.Tensor:
    model, _ = load_model(model_file)
    pixels = np.stack([decode(file, 10) for file in files])
    with torch.no_grad():
        return model(torch.from_numpy(pixels).permute(0, 3, 1, 2)).softmax(1)


def test_paths_images_and_tensors_are_the_same(model_file: Path, photos: list[Path], images: Dataset) -> None:
    classifier = train.load(model_file).to("cpu")
    assert classifier.classes == images.class_names
    probabilities = expected_probabilities(model_file, photos)
    opened = [Image.open(file) for file in photos]
    tensor = torch.stack([torch.tensor(decode(file, 10)) for file in photos]).permute(0, 3, 1, 2)
    for samples in (photos, list(map(str, photos)), opened, tensor):
        found = classifier.predict(samples, k=3, batch_size=2)
        best = probabilities.topk(3)
        torch.testing.assert_close(found.probabilities, best.values)
        assert torch.equal(found.indices, best.indices)
        assert found.classes == [[images.class_names[i] for i in row] for row in best.indices.tolist()]
        assert found.labels == [[images.class_labels[i] for i in row] for row in best.indices.tolist()]
    torch.testing.assert_close(classifier.predict(photos[0], k=99).probabilities.sum(), torch.tensor(1.0))


def test_features_are_classified(features: Dataset, tmp_path: Path) -> None:
    file = save_trained(FEATURES, features, tmp_path / "model")
    found = train.load(file).predict(features.x_test, k=1)
    with torch.no_grad():
        assert torch.equal(found.indices[:, 0], load_model(file)[0](features.x_test).argmax(1))
    for dtype in (torch.float64, torch.float16):  # as NumPy makes features, and as networks do
        narrow = features.x_test.to(dtype)
        assert torch.equal(
            train.load(file).predict(narrow).indices, train.load(file).predict(narrow.float()).indices
        )
        train.load(file).evaluate(narrow, features.y_test)
    with pytest.raises(ValueError, match=r"samples: expected tensors of features \[n, d\]"):
        train.load(file).predict("bird.jpg")
    with pytest.raises(ValueError, match=r"expected floating-point features \[n, 12\], got \[2, 3, 4, 4\]"):
        train.load(file).predict(torch.zeros(2, 3, 4, 4))


def test_flips_average_the_probabilities_of_both_views(
    model_file: Path,
    photos: list[Path],
    features: Dataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (10, 10, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file := tmp_path / "noise.png")
    Image.fromarray(noise[:, ::-1]).save(mirrored := tmp_path / "mirrored.png")
    classifier = train.load(model_file)
    views = [classifier.predict(view, k=5) for view in (file, mirrored)]
    assert not torch.equal(views[0].probabilities, views[1].probabilities)
    mean = sum(torch.zeros(1, 5).scatter(1, view.indices, view.probabilities) for view in views) / 2
    for view in (file, mirrored):
        found = classifier.predict(view, k=5, flips=True)
        torch.testing.assert_close(found.probabilities, mean.gather(1, found.indices))
    assert main(["predict", str(model_file), str(file), "--flips", "--json", "--device", "cpu"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["probabilities"] == pytest.approx(found.probabilities[0].tolist())
    with pytest.raises(ValueError, match="flips: expected False for a model of features, got True"):
        train.load(save_trained(FEATURES, features, tmp_path / "model")).predict(features.x_test, flips=True)


def test_wrong_arguments_are_named(model_file: Path) -> None:
    classifier = train.load(model_file)
    with pytest.raises(ValueError, match=r"expected images \[n, 3, 10, 10\] uint8, got \[1, 3, 9, 9\]"):
        classifier.predict(torch.zeros(1, 3, 9, 9, dtype=torch.uint8))
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        classifier.predict("bird.jpg", k=0)
    with pytest.raises(ValueError, match="samples: expected at least one sample"):
        classifier.predict([])
    array = np.zeros((9, 9, 3), np.uint8)  # as OpenCV reads images
    others: dict[str, Any] = {
        "ndarray": array,
        "bytes": [b"bird.jpg"],
        "generator": (x for x in [array]),
        "set": {"bird.jpg"},
    }
    for kind, samples in others.items():
        with pytest.raises(
            TypeError, match=rf"samples: expected paths or PIL images .*, or one tensor, got {kind}"
        ):
            classifier.predict(samples)
        with pytest.raises(TypeError, match="samples: expected a tensor, got "):
            classifier.evaluate(samples, ["bird"])
    with pytest.raises(ValueError, match=r"samples: expected images .*, got \[\] torch.uint8"):
        classifier.predict(torch.tensor(3, dtype=torch.uint8))


def test_a_folder_becomes_csv(
    model_file: Path, photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(model_file), str(photos[0].parent), "--k", "2", "--device", "cpu"]) == 0
    header, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert header == ["path", "class_1", "probability_1", "class_2", "probability_2", "error"]
    assert [row[0] for row in rows] == list(map(str, photos))
    best = expected_probabilities(model_file, photos).topk(2)
    names = train.load(model_file).classes
    assert [row[1] for row in rows] == [names[i] for i in best.indices[:, 0].tolist()]
    written = torch.tensor([[float(row[2]), float(row[4])] for row in rows])
    torch.testing.assert_close(written, best.values, atol=1e-6, rtol=0)


def test_an_unreadable_file_is_a_row_with_its_reason(
    model_file: Path, photos: list[Path], tmp_path: Path
) -> None:
    (damaged := tmp_path / "damaged.jpg").write_bytes(b"no image")
    missing, out = tmp_path / "missing.jpg", tmp_path / "rows.jsonl"
    files = [str(damaged), str(photos[0]), str(missing), str(tmp_path / "photos" / "**" / "*.jpg")]
    options = ["--json", "--out", str(out), "--batch-size", "2", "--workers", "1", "--device", "cpu"]
    assert main(["predict", str(model_file), *files, *options]) == 3
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["path"] for row in rows] == [str(damaged), str(photos[0]), str(missing), str(photos[1])]
    assert "cannot identify image file" in rows[0]["error"]
    assert "No such file" in rows[2]["error"]
    assert [len(row["classes"]) for row in rows] == [0, 5, 0, 5]
    assert rows[1]["error"] is None


def test_files_of_features_are_classified(
    features: Dataset,
    feature_file: Path,
    model_file: Path,
    image_file: Path,
    photos: list[Path],
    tmp_path: Path,
) -> None:
    head, out = save_trained(FEATURES, features, tmp_path / "head"), tmp_path / "rows.jsonl"
    alone = tmp_path / "x.safetensors"
    save_file({"x": features.x_train[:3]}, alone)
    (damaged := tmp_path / "damaged.npz").write_bytes(b"PK")
    files = [str(feature_file), str(alone), str(image_file), str(damaged)]
    options = ["--json", "--out", str(out), "--batch-size", "30", "--k", "2", "--device", "cpu"]
    assert main(["predict", str(head), *files, *options]) == 3
    *rows, wrong, unreadable = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    paths = [f"{feature_file}[{i}]" for i in range(100)] + [f"{alone}[{i}]" for i in range(3)]
    assert [row["path"] for row in rows] == paths
    found = train.load(head).predict(torch.cat([features.x_test, features.x_train[:3]]), k=2)
    assert [row["classes"] for row in rows] == found.classes
    assert wrong["path"] == str(image_file)
    assert wrong["error"] == "x_test: expected samples [12], which the model takes, got [3, 10, 10]"
    assert "expected a readable .npz file" in unreadable["error"]

    mixed = [str(photos[0]), str(image_file), str(photos[1])]
    assert main(["predict", str(model_file), *mixed, *options]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["path"] for row in rows[::101]] == [str(photos[0]), str(photos[1])]
    x = torch.tensor(np.load(image_file)["x_test"]).permute(0, 3, 1, 2)
    assert [row["classes"] for row in rows[1:101]] == train.load(model_file).predict(x, k=2).classes


def test_a_list_names_images(
    model_file: Path, photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (photos[0].parent / "list.txt").write_text("deep/b.jpg 1\na.png 0\n", encoding="utf-8")
    assert main(["predict", str(model_file), str(photos[0].parent / "list.txt"), "--device", "cpu"]) == 0
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))[1:]
    assert [row[0] for row in rows] == [str(photos[1]), str(photos[0])]


def test_errors_name_the_option(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (empty := tmp_path / "empty").mkdir()
    for args, error in (
        ([str(empty / "model"), "a.png"], "--model: expected a trained model, runs/<name>/model-"),
        ([str(model_file), str(empty)], f"--images: expected at least one image file, got none in {empty}"),
        ([str(model_file), "a.png", "--k", "0"], "--k: expected at least 1, got 0"),
        ([str(model_file), "a.png", "--out", str(tmp_path / "no" / "x.csv")], "--out: expected a file in an"),
    ):
        assert main(["predict", *args]) == 2
        assert error in capsys.readouterr().err


def test_the_example_of_the_documentation(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"### Predict\n.*?```python\n(.*?)```", text, re.DOTALL)
    write_image(tmp_path / "bird.jpg", (250, 10, 10))
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code, found)
    assert len(found["found"].classes[0]) == 3


def test_fit_returns_results_and_models(features: Dataset, feature_file: Path, tmp_path: Path) -> None:
    short = {"stage1_epochs": 1, "stage2_epochs": 1, "classes_per_batch": 3, "device": "cpu"}
    options = {"data": str(feature_file), "runs": str(tmp_path), "name": "r", "methods": ("gist",)} | short
    result = train.fit("features", **options)["gist"]
    best = train.load(result["model"]).predict(features.x_test, k=1).indices[:, 0]
    assert float((best == features.y_test).float().mean()) == pytest.approx(result["accuracy"]["overall"])
    with pytest.raises(ConfigError, match="--epochs: expected the name of an option"):
        train.fit("features", epochs=3)
    with pytest.raises(ConfigError, match="--stage1-epochs: expected int, got 'many'"):
        train.fit("features", stage1_epochs="many")


def test_fit_warns_of_options_without_effect(feature_file: Path, tmp_path: Path) -> None:
    config = FEATURES.replace(data=str(feature_file), runs=str(tmp_path), methods=("plain",), flip=True)
    short: dict[str, Any] = {"stage1_epochs": 1, "stage2_epochs": 0}
    with pytest.warns(RuntimeWarning) as caught:
        train.fit(config, **short, tau_norm=0.5)
    (warning,) = caught
    assert str(warning.message) == "--tau-norm has no effect without --methods tau-norm"
    assert Path(warning.filename) == Path(__file__)


def test_fit_takes_a_config(feature_file: Path, tmp_path: Path) -> None:
    short = FEATURES.replace(data=str(feature_file), stage1_epochs=1, stage2_epochs=1, methods=("plain",))
    config = short.replace(runs=str(tmp_path), name="")
    results = train.fit(config)
    assert results["plain"]["model"] == tmp_path / "features" / "model-plain.safetensors"
    again = train.fit(config, data=feature_file, name="again", methods=["plain"])  # a path and a list
    assert again["plain"]["accuracy"] == results["plain"]["accuracy"]
    with pytest.raises(ConfigError, match=r"--threads: expected .*int.*, got 'all'"):
        train.fit(config.replace(threads=None), threads="all")
    with pytest.raises(
        ConfigError, match=r"--recipe: expected a recipe's name, a \.toml file or a Config, got 3"
    ):
        train.fit(3)  # type: ignore[arg-type]
    for recipe in (None, "features"):
        with pytest.raises(ConfigError, match="--data: expected str, got array"):
            train.fit(recipe, data=np.zeros((3, 2)))


def test_fit_without_a_recipe_takes_the_classes_from_the_data(feature_file: Path, tmp_path: Path) -> None:
    words = {
        "backbone": "none",
        "stage1_epochs": 1,
        "stage2_epochs": 0,
        "methods": ["plain"],
        "device": "cpu",
    }
    result = train.fit(data=feature_file, runs=tmp_path, **words)["plain"]
    assert result["model"] == tmp_path / "features" / "model-plain.safetensors"
    assert len(train.load(result["model"]).classes) == 5
    parsed = parse_run(["--data", str(feature_file), "--lr", "0.5"])
    assert configure(None, {"data": feature_file, "lr": 0.5}).replace(name="features") == parsed
    assert configure(None, {"lr": 0.5}) == parse_run(["--lr", "0.5"])


def test_the_preset_of_the_paper_replaces_what_the_recipe_departs_from() -> None:
    recipe, paper = configure("features", {}), configure("features", {"preset": "paper", "lr": 0.5})
    parsed = parse_run(["--recipe", "features", "--data", "x.npz", "--preset", "paper", "--lr", "0.5"])
    assert recipe.model.center_features
    assert paper.replace(data="x.npz") == parsed.replace(recipe="features")


@pytest.mark.parametrize("method", ["gist", "plain"])
def test_a_method_scores_on_the_device_of_its_model(method: str, features: Dataset, tmp_path: Path) -> None:
    """Scores such as "both heads" need tensors of the method beside those of the model. meta stands for a GPU."""
    classifier = train.load(save_trained(FEATURES, features, tmp_path / "model.safetensors", method))
    x = torch.empty(3, features.sample_shape[0])
    rows = list(classifier.trained.scores(x))
    assert len(rows) > 1
    moved = classifier.to("meta").trained.scores(x.to("meta"))
    assert list(moved) == rows
    assert all(scores.is_meta for scores in moved.values())
