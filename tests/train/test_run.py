"""The results of a run: model files that load again, the table, complete files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from train.__main__ import main
from train.data.sources.arrays import load_arrays
from train.evaluation.evaluate import evaluate
from train.model.model import load_model
from train.report.table import print_results

from .conftest import shared_file

SHORT = "--classes-per-batch 3 --stage1-epochs 2 --stage2-epochs 2 --device cpu"


def results_of(folder: Path) -> dict[str, dict[str, Any]]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {record["method"]: record for record in records if record["event"] == "result"}


@pytest.mark.parametrize("kind", ["images", "features"])
def test_written_models_classify_as_reported(
    kind: str, image_file: Path, feature_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = image_file if kind == "images" else feature_file
    options = f"--recipe {'smoke' if kind == 'images' else 'features'} --data {file} --num-classes 5 --name r"
    assert main([*options.split(), *SHORT.split(), "--runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    data = load_arrays(str(file))
    for method, result in results_of(tmp_path / "r").items():
        model, names = load_model(tmp_path / "r" / f"model-{method}.safetensors")
        assert names == data.class_names
        assert not any("random" in name for name in model.state_dict())  # v has done its work
        found, _ = evaluate(model, data.x_test, data.y_test, data.num_classes)
        assert found.per_class() == result["accuracy_per_class"]
        assert f"{100 * result['accuracy']['overall']:.1f}" in shown
    for line in (
        "gist stage 1 epoch 1/2 ",
        "gist stage 2 epoch 2/2 ",
        "plain epoch 4/4 ",
        "images/s",
        " left",
    ):
        assert line in shown


def test_a_finished_run_resumed_shows_the_same_table(
    feature_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = f"--recipe features --data {feature_file} --runs {tmp_path} --name r {SHORT}".split()
    assert main(args) == 0
    first, before = capsys.readouterr().out, (tmp_path / "r" / "metrics.jsonl").read_bytes()
    with open(tmp_path / "r" / "metrics.jsonl", "a") as file:
        file.write('{"event": "epo')  # as a killed process may leave it
    (tmp_path / "r" / ".checkpoint.pt.tmp").write_bytes(b"half")
    assert main([*args, "--resume"]) == 0
    second = capsys.readouterr().out
    assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == before
    assert first[first.index("Test accuracy") :] == second[second.index("Test accuracy") :]


def test_one_method_alone_gives_the_same_bits_as_after_another(feature_file: Path, tmp_path: Path) -> None:
    args = f"--recipe features --data {feature_file} --runs {tmp_path} {SHORT}".split()
    assert main([*args, "--name", "both"]) == 0
    assert main([*args, "--name", "one", "--methods", "plain"]) == 0
    models = [(tmp_path / name / "model-plain.safetensors").read_bytes() for name in ("both", "one")]
    assert models[0] == models[1]


def test_a_resumed_run_needs_its_own_data(
    feature_arrays: dict[str, np.ndarray],
    feature_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = f"--recipe features --data {feature_file} --runs {tmp_path} --name r {SHORT}".split()
    assert main(args) == 0
    feature_arrays["x_test"][0, 0] += 1
    np.savez(feature_file, **feature_arrays)
    assert main([*args, "--resume"]) == 2
    assert "--data: expected the data that the run began with" in capsys.readouterr().err


def test_a_checkpoint_without_its_options_is_not_resumed(
    feature_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`rm -r` of the folder of a running run can leave one. Other options would go on from it."""
    args = (
        f"--recipe features --data {feature_file} --runs {tmp_path} --name r --methods plain {SHORT}".split()
    )
    assert main(args) == 0
    config = tmp_path / "r" / "config.toml"
    config.unlink()
    capsys.readouterr()
    before = {file.name: file.read_bytes() for file in config.parent.iterdir()}
    for more in ([], ["--lr", "0.3"]):
        assert main([*args, *more, "--resume"]) == 2
        assert f"error: --resume: expected {config}, the options that" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in config.parent.iterdir()} == before
    model = str(config.with_name("model-plain.safetensors"))
    assert main(["evaluate", model, "--data", str(feature_file)]) == 0
    assert main(["report", str(config.parent), "--out", str(tmp_path / "page.html")]) == 0


def test_a_run_goes_on_where_its_data_has_moved(
    feature_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = f"--recipe features --runs {tmp_path} --name r --methods plain {SHORT}".split()
    assert main([*args, "--data", str(feature_file)]) == 0
    moved = feature_file.rename(tmp_path / "elsewhere.npz")
    assert main([*args, "--data", str(moved), "--resume", "--checkpoint-steps", "7"]) == 0
    assert str(moved) in (tmp_path / "r" / "config.toml").read_text()
    assert main([*args, "--data", str(moved), "--resume", "--seed", "5"]) == 2
    assert "--seed: expected 0 as in" in capsys.readouterr().err


def test_a_run_that_failed_before_its_first_checkpoint_leaves_its_name_free(
    feature_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = (
        f"--recipe features --data {feature_file} --runs {tmp_path} --name r --methods plain {SHORT}".split()
    )
    # Weights are infinite after the first step, so that the loss of the second is no number, whatever the data.
    assert main([*args, "--lr", "1e38", "--weight-decay", "1e5"]) == 1
    assert [file.name for file in (tmp_path / "r").iterdir() if file.suffix == ".pt"] == []
    assert main(args) == 0
    assert main(args) == 2
    assert "--name: expected a new run" in capsys.readouterr().err


def test_a_run_that_diverges_says_so(
    feature_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = (
        f"--recipe features --data {feature_file} --runs {tmp_path} --lr 1e30 --methods plain {SHORT}".split()
    )
    assert main(args) == 1
    message = capsys.readouterr().err
    assert message.startswith(("error: the loss is ", "error: a weight of the model is not finite"))
    assert len(message.splitlines()) == 1


def test_a_runs_config_is_a_recipe(feature_file: Path, tmp_path: Path) -> None:
    args = f"--recipe features --data {feature_file} --runs {tmp_path} --name a --lr 0.07 {SHORT}".split()
    assert main(args) == 0
    again = ["--recipe", str(tmp_path / "a" / "config.toml"), "--runs", str(tmp_path), "--name", "b"]
    assert main(again) == 0
    for name in ("model-gist.safetensors", "model-plain.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_table_counts_the_classes_of_each_group(capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = {"overall": 0.5, "many": 0.75, "medium": None, "few": 0.25}
    results = [{"method": "plain", "images": 1234, "accuracy": accuracy}]
    console = Console(width=100, force_terminal=False)
    print_results(console, results, torch.tensor([500, 400, 300, 5]), "standard")
    table = capsys.readouterr().out
    for words in (
        "rule standard",
        "4 classes",
        "3 classes",
        "0 classes",
        "1 class ",
        "50.0",
        "75.0",
        "–",
        "25.0",
        "rule standard; 1,234 image passes",
    ):
        assert words in table


def test_the_table_has_the_methods_first_and_their_image_passes_where_these_differ(
    capsys: pytest.CaptureFixture[str],
) -> None:
    accuracy = dict.fromkeys(("overall", "many", "medium", "few"), 0.5)
    results = [
        {"method": "cos-gist", "images": 1234, "accuracy": accuracy, "accuracy_of": {"both heads": accuracy}},
        {"method": "plain", "images": 4321, "accuracy": accuracy},
    ]
    print_results(Console(width=100, force_terminal=False), results, torch.tensor([500, 5]), "standard")
    shown = capsys.readouterr().out
    words = ("COS+GIST ", "1,234", "plain softmax ", "4,321", "COS+GIST: ", "both heads ")
    assert sorted(words, key=shown.index) == list(words)


def test_a_head_alone_on_real_features(tmp_path: Path) -> None:
    """A plain head reaches 41 %, COS+GIST 47 % in another program's runs, one each."""
    file = shared_file("cifar100_lt100_features.npz")
    assert (
        main(["--recipe", "features", "--data", str(file), "--runs", str(tmp_path), "--device", "cpu"]) == 0
    )
    results = results_of(tmp_path / "features")
    assert results["plain"]["accuracy"]["overall"] > 0.395
    assert results["gist"]["accuracy"]["overall"] > 0.46
    assert results["gist"]["accuracy"]["few"] > results["plain"]["accuracy"]["few"] + 0.1
    assert min(results["gist"]["slot_usage"]) > 0.05
