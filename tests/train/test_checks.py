"""Tests of the checks that a run and the doctor share: what the doctor passes runs, and what would fail is named before."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from train import footprint
from train.__main__ import main
from train.checks import Doubt, fill_in, problems_of
from train.cli import data_name, parse_run
from train.config import Config, MethodName
from train.data.dataset import Dataset
from train.data.sources.arrays import load_arrays
from train.training.trainer import Trainer

from .short_runs import FEATURES, IMAGES


def test_options_that_describe_the_data_come_from_other_data(tree: Path) -> None:
    own = parse_run([])
    assert (own.run.name, own.data.num_classes, own.method.classes_per_batch) == ("fashion-mnist-lt", 10, 8)
    other = parse_run(["--data", str(tree)])
    assert other.run.name == "set"
    assert (other.data.num_classes, other.method.classes_per_batch) == (None, None)
    assert other.model == own.model
    asked = parse_run(["--data", str(tree), "--num-classes", "7", "--name", "n", "--classes-per-batch", "2"])
    assert (asked.run.name, asked.data.num_classes, asked.method.classes_per_batch) == ("n", 7, 2)
    named = parse_run(["--recipe", "smoke", "--data", str(tree)])
    assert (named.run.name, named.data.num_classes, named.method.classes_per_batch) == ("smoke", 10, 8)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("a/b.npz", "b"),
        ("a/cifar-100-python.tar.gz", "cifar-100-python"),
        ("a/list.train.csv", "list.train"),
        ("a/x.tgz", "x"),
    ],
)
def test_a_run_is_named_after_its_data(data: str, name: str) -> None:
    assert data_name(data) == name


def test_a_run_is_named_after_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "birds.v2" / "Train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "birds.v2")
    for data in (".", f"{tmp_path}/birds.v2/", "Train"):
        assert data_name(data) == "birds.v2"


@pytest.mark.parametrize(
    ("given", "classes", "filled"),
    [
        ({}, 100, (32, 4)),
        ({}, 10, (10, 12)),
        ({}, 200, (32, 4)),
        ({"classes_per_batch": 8}, 10, (8, 4)),
        ({"samples_per_class": 3}, 10, (10, 3)),
        ({"samples_per_class": 3, "classes_per_batch": 5}, 10, (5, 3)),
    ],
)
def test_the_balanced_stream_fits_the_data(
    given: dict[str, int], classes: int, filled: tuple[int, int]
) -> None:
    assert Config().replace(**given).method.balanced_sizes(classes) == filled


def test_a_run_and_the_doctor_take_a_folder_as_it_is(
    tree: Path, cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--data {tree} --cache {cache} --image-size 16 --device cpu --runs {tmp_path / 'runs'}".split()
    words += ["--methods", "plain", "--stage1-epochs", "1", "--stage2-epochs", "0"]
    assert main(["doctor", *words]) == 0, capsys.readouterr().out
    assert "no problems" in capsys.readouterr().out
    assert main(words) == 0
    config = (tmp_path / "runs" / "set" / "config.toml").read_text()
    assert "classes_per_batch = 3\n" in config
    assert "samples_per_class = 42\n" in config


@pytest.mark.parametrize("runs", ["afile", "afile/below", "link"])
def test_a_file_in_place_of_the_folder_of_runs(
    runs: str, feature_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "afile").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    words = f"--recipe features --data {feature_file} --runs {tmp_path / runs} --name r --device cpu".split()
    place = tmp_path / runs.partition("/")[0]
    assert main(["doctor", *words]) == 1
    assert f"--runs: expected a writable folder, got {place} (Not a directory)" in capsys.readouterr().out
    assert main(words) == 2
    assert "--runs: expected a writable folder, got " in capsys.readouterr().err


def test_auto_stays_auto(feature_file: Path, tmp_path: Path) -> None:
    words = f"--recipe features --data {feature_file} --runs {tmp_path} --name r --methods plain"
    assert main([*words.split(), "--stage1-epochs", "1", "--stage2-epochs", "0"]) == 0
    assert 'device = "auto"\n' in (tmp_path / "r" / "config.toml").read_text()
    environment = json.loads((tmp_path / "r" / "environment.json").read_text())
    assert environment["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert environment["torch"] == torch.__version__


def options_of(config: Config, data: Dataset) -> list[str]:
    return [str(problem).split(":")[0] for problem in problems_of(fill_in(config, data), data)]


def fails(config: Config, data: Dataset) -> bool:
    """Return whether a training of the first method fails, within an epoch of each stage."""
    try:
        trainer = Trainer(config.method.methods[0], config.replace(stage1_epochs=1, stage2_epochs=1), data)
        while trainer.stage < len(trainer.method.stages):
            for _ in range(trainer.steps_per_epoch):
                trainer.step()
            trainer.end_epoch()
            trainer.begin_stage(trainer.stage + 1)
    except (ValueError, RuntimeError):
        return True
    return False


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({}, None),
        ({"displacement_update": "residuals", "num_displacements": 255}, "--num-displacements"),
        ({"displacement_init": "residuals", "num_displacements": 255}, "--num-displacements"),
        ({"transfer_directions": 181}, "--transfer-directions"),
        ({"transfer_directions": 180}, None),
        (
            {"transfer_directions": 255, "displacement_init": "residuals", "num_displacements": 255}
            | {"methods": ("cos-cs-cb",)},
            "--num-displacements",
        ),
        ({"methods": ("cos-gist",), "displacement_init": "residuals", "num_displacements": 255}, None),
        ({"batch_norm": "split", "classes_per_batch": 1, "samples_per_class": 1}, "--batch-norm"),
        ({"batch_norm": "split", "batch_size": 231}, None),
        ({"classes_per_batch": 1, "samples_per_class": 1, "accumulate": 1}, None),
        ({"methods": ("plain",), "batch_size": 1, "classes_per_batch": 1, "samples_per_class": 1}, None),
        ({"classes_per_batch": 6}, "--classes-per-batch"),
    ],
)
def test_problems_with_features_are_found_where_training_fails(
    change: dict[str, object], option: str | None, features: Dataset
) -> None:
    config = FEATURES.replace(**{"methods": ("gist",)} | change)
    assert options_of(config, features) == ([option] if option else [])
    steps = None if "batch_size" in change else 2
    assert fails(config.replace(max_steps_per_epoch=steps), features) == (option is not None)


def test_too_many_directions_are_named_with_the_value_of_their_option(features: Dataset) -> None:
    more = FEATURES.replace(methods=("gist",), displacement_update="residuals", num_displacements=255)
    (problem,) = problems_of(more.replace(transfer_directions=181), features)
    expected = "at most 180, the training samples of the classes with more than the mean number"
    assert str(problem) == f"--transfer-directions: expected {expected}, got 181 for gist"
    (problem,) = problems_of(more, features)
    assert str(problem) == f"--num-displacements: expected {expected}, got 255 for gist"


def test_a_network_that_does_not_take_the_images_is_named(
    images: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fixed(torch.nn.Module):
        """A network for images 32×32 alone, as vision transformers are."""

        out_features = 4

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[2] != 32:
                raise AssertionError(f"Input height ({x.shape[2]}) doesn't match model (32).")
            return x.mean((2, 3))

    monkeypatch.setattr(footprint, "make_backbone", lambda *_: Fixed())
    (problem,) = problems_of(IMAGES, images)
    expected = "--image-size: expected a size that resnet8-half takes, got [10, 10] (Input height (10) doesn't match model (32).)"
    assert str(problem) == expected


def test_a_folder_of_runs_that_cannot_be_written_is_found(images: Dataset, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root may write everywhere
        found = options_of(IMAGES.replace(runs=str(tmp_path / "new")), images)
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o755)
    assert found == ["--runs"]


def test_the_network_of_images_takes_its_samples(images: Dataset) -> None:
    assert options_of(IMAGES, images) == []
    assert options_of(IMAGES.replace(crop_size=11), images) == ["--crop-size"]
    assert options_of(IMAGES.replace(backbone="none"), images) == ["--backbone"]


def test_memory_and_disk_are_compared_with_what_is_free(
    images: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = footprint.try_network(IMAGES, images, 2)
    assert trial.features == 128
    # The first convolution keeps its input, and its output for the normalization after it.
    assert trial.activations > 4 * (3 * 10 * 10 + 2 * 32 * 5 * 5)
    assert trial.values == 3 * 10 * 10
    twice = IMAGES.replace(batch_size=100)
    needed = [footprint.memory_needed("plain", config, images, trial) for config in (IMAGES, twice)]
    assert needed[1] - needed[0] == 50 * (trial.activations + trial.values + 2 * 4 * 5)
    fixed = footprint.fixed_memory("plain", IMAGES, images, trial)
    for available, option in ((fixed, "--batch-size"), (fixed - 1, "--methods")):
        monkeypatch.setattr("train.checks.memory_available", lambda device, free=available: free)
        (problem,) = problems_of(IMAGES.replace(methods=("plain",)), images)
        assert isinstance(problem, Doubt)
        assert str(problem).startswith(
            f"{option}: expected about {needed[0]:,} bytes of free memory on cpu for plain"
        )
    assert f"{fixed:,} of them with any --batch-size, got {fixed - 1:,}" in str(problem)
    monkeypatch.setattr("train.checks.memory_available", lambda device: None)
    monkeypatch.setattr("train.checks.disk_available", lambda config: 1000)
    (problem,) = problems_of(IMAGES, images)
    assert str(problem).startswith("--runs: expected about ")
    assert not isinstance(problem, Doubt)


@pytest.mark.parametrize(
    ("methods", "epochs", "warm_up", "shorter"),
    [
        (("plain", "gist"), (2, 3), 2.5, "2, the epochs of stage 1 of gist"),
        (("gist",), (3, 2), 2.5, "2, the epochs of stage 2 of gist"),
        (("plain",), (2, 1), 3.5, "3, the epochs of plain"),
        (("plain",), (2, 1), 3, ""),  # reaches --lr in its last step
        (("gist",), (0, 3), 3, ""),  # has no first stage
        (("crt",), (5, 0), 4, ""),  # its second stage has no warm-up
    ],
)
def test_a_warm_up_that_is_longer_than_a_stage_is_doubtful(
    methods: tuple[MethodName, ...],
    epochs: tuple[int, int],
    warm_up: float,
    shorter: str,
    features: Dataset,
) -> None:
    config = FEATURES.replace(
        methods=methods,
        stage1_epochs=epochs[0],
        stage2_epochs=epochs[1],
        warmup_epochs=warm_up,
        crt_epochs=2,
    )
    found = list(problems_of(config, features))
    assert all(isinstance(problem, Doubt) for problem in found)
    expected = (
        f"--warmup-epochs: expected at most {shorter}, which otherwise does not reach --lr, got {warm_up}"
    )
    assert [str(problem) for problem in found] == ([expected] if shorter else [])


def test_fp16_on_a_cpu_is_said_before_the_start(
    feature_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--recipe features --data {feature_file} --runs {tmp_path} --methods plain --device cpu"
    assert main([*words.split(), "--precision", "fp16", "--stage1-epochs", "1", "--stage2-epochs", "0"]) == 0
    said = capsys.readouterr().out
    assert "warning: --precision: expected float32 or bf16 on a CPU" in said
    assert said.index("warning: --precision") < said.index("epoch 1/1")


def test_the_disk_and_the_memory_of_this_machine_are_known() -> None:
    assert footprint.disk_available(Config().replace(runs="nowhere", name="r")) > 0
    available = footprint.memory_available(torch.device("cpu"))
    assert available is None or available > 2**20


def test_features_without_a_recipe(feature_arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    np.savez(tmp_path / "five.npz", **feature_arrays)
    words = f"--data {tmp_path / 'five.npz'} --backbone none --runs {tmp_path} --methods plain --device cpu"
    assert main([*words.split(), "--stage1-epochs", "1", "--stage2-epochs", "0"]) == 0
    assert (tmp_path / "five" / "model-plain.safetensors").is_file()
    assert load_arrays(str(tmp_path / "five.npz")).num_classes == 5
