"""Tests of the command `evaluate` and of `Classifier.evaluate`, with models that were trained in a few steps."""

from __future__ import annotations

import csv
import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import train
from train.__main__ import main
from train.config import DataConfig
from train.data.dataset import Dataset
from train.data.load import load
from train.data.sources.arrays import load_arrays
from train.evaluated import analysis_of, as_dataset

from .short_runs import FEATURES, IMAGES
from .test_classifier import save_trained

Arrays = dict[str, np.ndarray]
NAMES = ["ant, red", 'bee "b"', "cat\ncow", "дог", "eel"]
COMMAND = ["--device", "cpu", "--json"]


@pytest.fixture
def named(feature_arrays: Arrays, tmp_path: Path) -> Path:
    """A file of features with names of classes that CSV must quote."""
    np.savez(tmp_path / "named.npz", **feature_arrays, classes=np.array(NAMES))
    return tmp_path / "named.npz"


@pytest.fixture
def feature_model(named: Path, tmp_path: Path) -> Path:
    return save_trained(FEATURES, load_arrays(str(named)), tmp_path / "model.safetensors")


@pytest.fixture
def image_model(images: Dataset, tmp_path: Path) -> Path:
    return save_trained(IMAGES, images, tmp_path / "model.safetensors")


def evaluated(capsys: pytest.CaptureFixture[str], model: Path, data: Path, *options: str) -> dict[str, Any]:
    """Return the JSON of the command, which must be all of its standard output."""
    capsys.readouterr()
    code = main(["evaluate", str(model), "--data", str(data), *COMMAND, *options])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    found: dict[str, Any] = json.loads(printed.out)
    return found


def error_of(capsys: pytest.CaptureFixture[str], model: Path, *options: str) -> str:
    capsys.readouterr()
    assert main(["evaluate", str(model), *COMMAND, *options]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("kind", ["features", "images"])
def test_the_test_split_has_the_numbers_of_training(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = request.getfixturevalue("feature_file" if kind == "features" else "image_file")
    methods = ("gist", "plain", "tau-norm", "oltr") if kind == "features" else ("gist",)
    short = {
        "stage1_epochs": 1,
        "stage2_epochs": 1,
        "crt_epochs": 1,
        "classes_per_batch": 3,
        "max_steps_per_epoch": 3,
        "device": "cpu",
    }
    backbone = {} if kind == "features" else {"backbone": "resnet8-half"}
    results = train.fit("features", data=str(data), runs=str(tmp_path), name="r", methods=methods, **short, **backbone)  # fmt: skip
    assert list(results) == list(methods)
    for method, trained in results.items():
        found = evaluated(capsys, trained["model"], data)
        expected = {
            key: trained[key] for key in trained.keys() - {"event", "images", "analysis", "model", "split"}
        }
        assert {"accuracy", "accuracy_per_class"} <= expected.keys()
        if method != "tau-norm":  # the file has the weights, but not the exponent that made them
            assert {key: found[key] for key in expected} == expected
        assert found["accuracy"] == trained["accuracy"]
        calibration = trained["analysis"]["calibration"]
        assert found["calibration"]["expected_calibration_error"] == calibration["error"]
        assert [list(row.values()) for row in found["calibration"]["bins"]] == calibration["bins"]
    classifier = train.load(results["gist"]["model"])
    loaded = load_arrays(str(data))
    samples = as_dataset(classifier.trained, loaded.x_test, loaded.y_test)
    scores = classifier.evaluate(loaded.x_test, loaded.y_test)
    assert analysis_of(classifier.trained, samples, scores) == results["gist"]["analysis"]


def test_arrays_without_training_samples_are_matched_by_name(
    feature_model: Path,
    named: Path,
    feature_arrays: Arrays,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The names stand in another order, and a class without samples has a name that the model lacks."""
    expected = evaluated(capsys, feature_model, named)
    order = [3, 0, 4, 1, 2]
    y = np.argsort(order)[feature_arrays["y_test"]]
    names = np.array([NAMES[k] for k in order] + ["unused"])
    np.savez(tmp_path / "pair.npz", x=feature_arrays["x_test"], y=y, classes=names)
    found = evaluated(capsys, feature_model, tmp_path / "pair.npz")
    assert (found.pop("part"), expected.pop("part")) == ("all samples", "the test split")
    assert {**found, "data": ""} == {**expected, "data": ""}
    tensors = {"x": torch.tensor(feature_arrays["x_test"]), "y": torch.tensor(feature_arrays["y_test"])}
    safetensors.torch.save_file(tensors, tmp_path / "pair.safetensors", {"classes": json.dumps(NAMES)})
    found = evaluated(capsys, feature_model, tmp_path / "pair.safetensors")
    assert found["accuracy"] == expected["accuracy"]
    # Without names, the labels are those of the model's training data.
    safetensors.torch.save_file(tensors, tmp_path / "pair.safetensors")
    found = evaluated(capsys, feature_model, tmp_path / "pair.safetensors")
    assert found["accuracy"] == expected["accuracy"]


def test_unknown_classes_are_refused_or_skipped(
    feature_model: Path, feature_arrays: Arrays, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, y = feature_arrays["x_test"], feature_arrays["y_test"]
    file = tmp_path / "pair.npz"
    np.savez(file, x=x, y=y, classes=["emu", *NAMES[1:]])
    error = error_of(capsys, feature_model, "--data", str(file))
    assert "--data: expected classes that the model has, such as ant, red" in error
    assert "got 1 other: emu (--unknown skip" in error
    capsys.readouterr()
    assert main(["evaluate", str(feature_model), "--data", str(file), *COMMAND, "--unknown", "skip"]) == 0
    printed = capsys.readouterr()
    assert "left out 20 samples of 1 class that the model does not have: emu" in printed.err
    assert "Classes without samples: ant, red (1)." in printed.err
    found = json.loads(printed.out)
    assert (found["skipped"], found["samples"]) == ({"emu": 20}, 80)
    known = torch.from_numpy(y) > 0
    classifier = train.load(feature_model)
    best = classifier.predict(torch.from_numpy(x)[known], k=1).indices[:, 0]
    assert found["accuracy"]["overall"] == float((best == torch.from_numpy(y)[known]).double().mean())
    assert found["accuracy"]["many"] is None
    np.savez(file, x=x, y=y, classes=[f"emu {k}" for k in range(5)])
    assert "got 5 others" in error_of(capsys, feature_model, "--data", str(file), "--unknown", "skip")


def save_images(arrays: Arrays, folder: Path) -> list[Path]:
    """Write the test images to class folders. The format keeps their pixels."""
    files = []
    for i, (x, y) in enumerate(zip(arrays["x_test"], arrays["y_test"], strict=True)):
        file = folder / str(y) / f"{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x).save(file)
        files.append(file)
    return files


def test_folders_and_lists_have_the_numbers_of_the_arrays(
    image_model: Path, image_file: Path, arrays: Arrays, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = evaluated(capsys, image_model, image_file)
    cache = ("--cache", str(tmp_path / "cache"))
    files = save_images(arrays, tmp_path / "photos" / "test")
    found = evaluated(capsys, image_model, tmp_path / "photos" / "test", *cache, "--workers", "1")
    assert (found["accuracy"], found["samples"]) == (expected["accuracy"], 100)
    assert found["part"] == "all samples"
    lines = [f"old/{file.name} {y}" for file, y in zip(files, arrays["y_test"], strict=True)]
    for file in files:
        file.rename(tmp_path / "photos" / file.name)
    (tmp_path / "list.txt").write_text("\n".join(lines), encoding="utf-8")
    places = ("--images", str(tmp_path / "photos"), "--path-prefixes", "old/=")
    found = evaluated(capsys, image_model, tmp_path / "list.txt", *cache, *places)
    assert found["accuracy"] == expected["accuracy"]
    missing = error_of(capsys, image_model, "--data", str(tmp_path / "list.txt"), *cache)
    assert "100 of 100 images" in missing


def test_a_dataset_of_images_is_loaded_as_in_training(
    tree: Path, cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = DataConfig(data=str(tree / "train"), test_data="", hold_out=0.4, image_size=10, cache=cache)
    config = IMAGES.replace(data=held.data, hold_out=0.4)
    model = save_trained(config, load(held), tmp_path / "model.safetensors")
    found = evaluated(capsys, model, tree, "--cache", cache)
    assert (found["samples"], found["classes"]) == (3, ["ant", "bee", "cat"])
    assert found["part"] == "the test split"
    (tree / "val").rename(tree / "other")
    words = ["evaluate", str(model), "--data", str(tree / "train"), *COMMAND, "--cache", cache]
    for options, samples in (
        (["--hold-out", "0.4"], 4),
        ([], 9),
    ):  # of 4, 3 and 2 images, 2, 1 and 1 are held out
        assert main([*words, *options]) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["samples"] == samples
        warning = "on train with --hold-out 0.4: without it, training samples are evaluated too"
        assert (warning in " ".join(printed.err.split())) == (samples == 9)
    assert "--test-data: expected a list or folder" in error_of(capsys, model, "--data", str(tree))


def test_gray_models_take_image_files(
    arrays: Arrays, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gray = {part: x[..., 0] if part[0] == "x" else x for part, x in arrays.items()}
    np.savez(tmp_path / "gray.npz", **gray)
    model = save_trained(IMAGES, load_arrays(str(tmp_path / "gray.npz")), tmp_path / "model.safetensors")
    save_images(gray, tmp_path / "photos")
    expected = evaluated(capsys, model, tmp_path / "gray.npz")
    found = evaluated(capsys, model, tmp_path / "photos", "--cache", str(tmp_path / "cache"))
    assert found["accuracy"] == expected["accuracy"]


def test_mirror_images_are_averaged_as_by_predict(
    image_model: Path, image_file: Path, images: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier = train.load(image_model)
    expected = classifier.predict(images.x_test, k=1, batch_size=500, flips=True)
    found = classifier.evaluate(images.x_test, images.y_test, flips=True)
    assert torch.equal(found.predicted, expected.indices[:, 0])
    torch.testing.assert_close(found.confidence, expected.probabilities[:, 0])
    own = classifier.evaluate(images.x_test, images.y_test)
    assert not torch.equal(own.confidence, found.confidence)
    printed = evaluated(capsys, image_model, image_file, "--flips")
    assert (printed["flips"], printed["accuracy"]) == (True, found.accuracy)
    assert printed["accuracy_of"]["as after training"] == own.accuracy


def test_files_of_an_evaluation(
    feature_model: Path, named: Path, features: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "evaluation"
    for _ in range(2):  # a second evaluation replaces the first
        printed = evaluated(capsys, feature_model, named, "--out", str(out))
    assert sorted(file.name for file in out.iterdir()) == [
        "classes.csv",
        "confusion.csv",
        "metrics.json",
        "report.html",
    ]
    assert json.loads((out / "metrics.json").read_text(encoding="utf-8")) == printed
    best = train.load(feature_model).predict(features.x_test, k=1).indices[:, 0].tolist()
    y = features.y_test.tolist()
    with open(out / "confusion.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    pairs = [(NAMES[true], NAMES[predicted]) for true, predicted in zip(y, best, strict=True)]
    assert {(true, predicted): int(count) for true, predicted, count in rows} == {
        pair: pairs.count(pair) for pair in pairs
    }
    with open(out / "classes.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["class"] for row in table] == NAMES
    assert [row["group"] for row in table] == ["many", "medium", "medium", "few", "few"]
    assert [row["training_samples"] for row in table] == list(map(str, features.train_counts.tolist()))
    for row, name, correct in zip(table, NAMES, printed["accuracy_per_class"], strict=True):
        assert (row["n"], float(row["recall"])) == ("20", pytest.approx(correct, abs=1e-6))
        wrong = {to: n for (true, to), n in ((p, pairs.count(p)) for p in pairs) if true == name != to}
        assert int(row["times"]) == max(wrong.values(), default=0)
        assert row["taken_for"] == "" if not wrong else wrong[row["taken_for"]] == int(row["times"])
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "дог" in page
    assert "cat\ncow" not in page
    assert "Not drawn" not in page


def test_wrong_options_are_named(
    feature_model: Path, named: Path, image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "metrics.jsonl").touch()
    np.savez(tmp_path / "wide.npz", x=np.zeros((3, 7), np.float32), y=np.arange(3))
    np.savez(tmp_path / "none.npz", x=np.zeros((0, 12), np.float32), y=np.arange(0))
    np.savez(tmp_path / "long.npz", x=np.zeros((3, 12), np.float32), y=np.arange(4))
    np.savez(tmp_path / "beyond.npz", x=np.zeros((3, 12), np.float32), y=np.arange(3), classes=NAMES[:2])
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 12), np.float32))
    data = ["--data", str(named)]
    for options, error in (
        (["--data", str(tmp_path / "no.npz")], "expected an existing file, got none"),
        (["--data", str(tmp_path)], f"expected a model of images, got {feature_model}, a model of features"),
        (
            ["--data", str(image_file)],
            "--data: expected samples [12], which the model takes, got [3, 10, 10]",
        ),
        (
            ["--data", str(tmp_path / "wide.npz")],
            "--data: expected samples [12], which the model takes, got [7]",
        ),
        (["--data", str(tmp_path / "none.npz")], "x: expected at least one sample, got none"),
        (["--data", str(tmp_path / "long.npz")], "y: expected 3 labels to match x, got 4"),
        (["--data", str(tmp_path / "beyond.npz")], "y: expected labels of at least 0 and below 2"),
        (
            ["--data", str(tmp_path / "x.npz")],
            "expected the arrays x, y, or x_train, y_train, x_test, y_test, got x",
        ),
        ([*data, "--flips"], f"--model: expected a model of images, got {feature_model}"),
        ([*data, "--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
        ([*data, "--out", str(tmp_path / "a" / "b")], "--out: expected a folder in an existing folder"),
        ([*data, "--out", str(named)], "which is a file"),
        ([*data, "--out", str(tmp_path / "full")], "which has other files: metrics.jsonl"),
        ([*data, "--assumed-prior", "training"], "--assumed-prior: expected --adjust"),
    ):
        assert error in error_of(capsys, feature_model, *options)
    assert not (tmp_path / "a").exists()


def test_a_full_disk_is_named(
    feature_model: Path,
    named: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (100, limit[1])
    )  # bytes of a file, which Python reports as an error
    try:
        code = main(
            ["evaluate", str(feature_model), "--data", str(named), *COMMAND, "--out", str(tmp_path / "out")]
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: cannot write {tmp_path / 'out' / 'metrics.json'}: File too large")
    assert error.endswith("when this is repaired, the same command begins again")
    assert not any((tmp_path / "out").iterdir())


def test_classes_by_name_in_python(feature_model: Path, features: Dataset) -> None:
    classifier = train.load(feature_model)
    found = classifier.evaluate(features.x_test, [NAMES[k] for k in features.y_test.tolist()], batch_size=7)
    assert found.accuracy["overall"] == float((found.predicted == features.y_test).double().mean())
    with pytest.raises(ValueError, match="classes: expected the model's classes, got emu"):
        classifier.evaluate(features.x_test[:1], ["emu"])
    with pytest.raises(ValueError, match="classes: expected a class of each of 2 samples"):
        classifier.evaluate(features.x_test[:2], features.y_test[:1])
    with pytest.raises(ValueError, match="classes: expected positions in 5 classes, got 0 to 5"):
        classifier.evaluate(features.x_test[:2], torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="samples: expected at least one sample"):
        classifier.evaluate(features.x_test[:0], features.y_test[:0])
