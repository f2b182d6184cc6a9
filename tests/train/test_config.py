"""Tests of options: invalid options are refused before any work starts, in one line that names the option."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from train import config, data_options, method_options, tuning_options
from train.__main__ import main
from train.cli import parse, parse_run
from train.commands import ablation, features
from train.commands.ablation import Ablation
from train.commands.doctor import Doctor
from train.commands.features import Features
from train.config import Config, ConfigError, DisplacementConfig, MethodConfig
from train.options import Sections
from train.recipes import HINTS, configure, load_recipe, recipe_names

GOOD = {
    "x_train": np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32),
    "y_train": np.arange(12) % 3,
    "x_test": np.zeros((3, 5), np.float32),
    "y_test": np.arange(3),
}
WORDS = [
    ("--recipe nowhere", "--recipe: expected an existing .toml file, or one of "),
    ("--batch-size 0", "--batch-size: expected at least 1, got 0"),
    ("--classes-per-batch 11", "--classes-per-batch: expected at most 10"),
    ("--lr -1", "--lr: expected a number above 0, got -1.0"),
    ("--seed 4294967296", "--seed: expected below 2^32, got 4294967296"),
    ("--hold-out-seed 4294967296", "--hold-out-seed: expected below 2^32, got 4294967296"),
    ("--threads 100000", "--threads: expected at most 1,024, got 100000"),
    (
        "--data M\udcf6nch.npz",
        "--data: expected text in UTF-8, because config.toml records it, got M\\udcf6nch.npz",
    ),
    ("--momentum 1", "--momentum: expected at least 0 and below 1"),
    ("--tau-norm 2.1", "--tau-norm: expected from 0 to 2, got 2.1"),
    ("--num-displacements 256", "--num-displacements: expected 0 to 255, got 256"),
    ("--backbone resnet99", "--backbone: expected one of none, "),
    ("--data nowhere.npz", "nowhere.npz: expected an existing file, got none"),
    ("--data README.md", "expected a file of arrays named .npz or .safetensors"),
    ("--num-classes 11", "expected 11 classes"),
    ("--backbone none", "--backbone: expected a network, for images"),
    ("--device gpu9", "--device: expected cpu, cuda or auto"),
    ("--name a/b", "--name: expected a folder's name"),
    ("--name ..", "--name: expected a folder's name"),
    (
        "--stage1-epochs 0 --stage2-epochs 0",
        "--stage1-epochs: expected at least 1 if --stage2-epochs is 0, got 0",
    ),
]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
def test_numbers_are_finite_and_not_negative(value: float) -> None:
    names = [name for name, hint in HINTS.items() if hint in (float, float | None)]
    assert len(names) > 20
    for name in names:
        with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}: expected .*, got {value}"):
            Config().replace(**{name: value})


@pytest.mark.parametrize(("options", "words"), WORDS, ids=[w[0] for w in WORDS])
def test_invalid_options_are_named(
    options: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["--recipe", "smoke", "--runs", str(tmp_path), *options.split()])
    message = capsys.readouterr().err
    assert code == 2
    assert words in message
    assert len(message.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words", ["--split-rule many", "--precision int8", "--methods gist none", "--rate 1"]
)
def test_unknown_options_and_values_of_other_types(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--recipe", "smoke", *words.split()])
    assert stopped.value.code == 2
    assert words.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("ablation --vary lr=1 --vary weight-decay=0,1", "--vary"),
        ("ablation --seeds 0 --seeds=1", "--seeds"),
        ("--methods plain --methods gist", "--methods"),
        ("--path-prefixes a=b --path_prefixes c=d", "--path-prefixes"),
    ],
)
def test_a_list_is_given_once(
    words: str, flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words.split(), "--recipe", "smoke", "--runs", str(tmp_path / "runs")]) == 2
    expected = f"error: {flag}: expected all values after one {flag}, got 2 times {flag}\n"
    assert capsys.readouterr().err == expected
    assert not list(tmp_path.iterdir())


BAD_ARRAYS = [
    ({"x_train": None}, "expected the arrays x_train, y_train, x_test, y_test, got"),
    ({"y_train": np.arange(11) % 3}, "y_train: expected 12 labels to match x_train, got 11"),
    ({"y_train": np.zeros(12)}, "y_train: expected integer labels"),
    ({"y_train": np.arange(12) % 3 * 2}, "y_test: expected only classes that y_train has, got 1 too"),
    ({"y_val": np.arange(3)}, "expected x_val in addition to y_val, got none"),
    ({"y_test": np.array([0, 1, 7])}, "y_test: expected only classes that y_train has, got 7 too"),
    ({"x_test": np.zeros((3, 4), np.float32)}, "x_test: expected samples of x_train's shape"),
    ({"x_train": np.full((12, 5), np.nan, np.float32)}, "x_train: expected finite features, got 60"),
    ({"x_train": np.zeros((12, 5, 5, 7), np.uint8)}, "x_train: expected uint8 images"),
]


@pytest.mark.parametrize(("change", "words"), BAD_ARRAYS, ids=[w[1][:40] for w in BAD_ARRAYS])
def test_invalid_arrays_are_named(
    change: dict[str, np.ndarray], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = {name: value for name, value in (GOOD | change).items() if value is not None}
    np.savez(tmp_path / "data.npz", **arrays)
    options = ["--recipe", "features", "--data", str(tmp_path / "data.npz"), "--classes-per-batch", "3"]
    assert main([*options, "--runs", str(tmp_path / "runs")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_mistake_in_a_recipe_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('leraning_rate = 1.0\ndata = "fashion-mnist-lt"\n')
    with pytest.raises(ConfigError, match="leraning_rate"):
        load_recipe(str(tmp_path / "r.toml"))
    (tmp_path / "r.toml").write_text('lr = "fast"\n')
    with pytest.raises(ConfigError, match="--lr: expected float, got 'fast'"):
        load_recipe(str(tmp_path / "r.toml"))
    (tmp_path / "r.toml").write_text("lr = \n")
    with pytest.raises(ConfigError, match="--recipe: expected a readable TOML file"):
        load_recipe(str(tmp_path / "r.toml"))


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_is_valid(recipe: str) -> None:
    config = parse_run(["--recipe", recipe, "--data", "x.npz"])
    assert config.run.name == recipe


def test_the_command_line_overrides_the_recipe() -> None:
    config = parse_run(["--recipe", "smoke", "--lr", "0.25", "--methods", "plain"])
    assert (config.optim.lr, config.method.methods) == (0.25, ("plain",))
    assert config.optim.max_steps_per_epoch == load_recipe("smoke").optim.max_steps_per_epoch


def test_a_tilde_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell replaces it where it begins a word, which leaves --data=~/x, recipes and calls of `fit`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.toml").write_text("runs = '~/runs'\ncache = '~'\nimages = 'a~/~'\n", encoding="utf-8")
    written = load_recipe(str(tmp_path / "mine.toml"))
    assert (written.run.runs, written.data.cache) == (str(tmp_path / "runs"), str(tmp_path))
    assert written.data.images == "a~/~"
    assert load_recipe("~/mine.toml").run.runs == written.run.runs
    assert configure(None, {"pretrained_file": "~/a.pth"}).model.weights == str(tmp_path / "a.pth")
    assert main(["doctor", "--recipe=~/mine.toml", "--data=~/nothing"]) == 2
    assert capsys.readouterr().err.startswith(f"error: --data: {tmp_path}/nothing: expected an existing")
    assert main(["predict", "~/none.safetensors", "x.png", "--out=~/none/x.csv"]) == 2
    assert (
        f"--out: expected a file in an existing folder, got {tmp_path}/none/x.csv" in capsys.readouterr().err
    )


def test_preset_paper_restores_the_papers_settings() -> None:
    moved = ["--displacement-update", "residuals", "--transfer-directions", "32"]
    for recipe in ("cifar100-lt", "cifar10-lt"):
        cifar = parse_run(["--recipe", recipe, "--data", "x.npz"])
        assert (cifar.method.balancing, cifar.method.balanced_loss_weight) == ("prior", 1.0)
        paper = parse_run(["--recipe", recipe, "--data", "x.npz", "--preset", "paper"])
        assert (paper.method.balancing, paper.method.balanced_loss_weight) == ("sampling", 0.5)
        assert paper.displacements == DisplacementConfig()
        own = parse_run(["--recipe", recipe, "--data", "x.npz", "--preset", "paper", *moved])
        assert own.displacements.displacement_update == "residuals"
        assert own.displacements.transfer_directions == 32
    recipe = parse_run(["--recipe", "features", "--data", "x.npz"])
    assert (recipe.method.balancing, recipe.method.center_init) == ("prior", "means")
    paper = parse_run(["--recipe", "features", "--data", "x.npz", "--preset", "paper"])
    assert paper.method == MethodConfig()
    assert recipe.model.center_features
    assert not paper.model.center_features
    assert (paper.optim, paper.run.preset) == (recipe.optim, "paper")
    mixed = parse_run(["--recipe", "features", "--data", "x.npz", "--preset", "paper", "--center-features"])
    assert mixed.model.center_features


def test_names_of_options_are_unique_over_the_sections() -> None:
    names = [part.name for _, section in Config.sections() for part in dataclasses.fields(section)]
    assert len(set(names)) == len(names)
    assert Config.fields().keys() == set(names)


def test_options_are_replaced_in_their_sections() -> None:
    changed = Config().replace(lr=0.25, batch_size=7)
    assert (changed.optim.lr, changed.method) == (0.25, MethodConfig(batch_size=7))
    assert changed.options() == Config().options() | {"lr": 0.25, "batch_size": 7}
    with pytest.raises(TypeError, match="got rate"):
        changed.replace(rate=1)
    with pytest.raises(ConfigError, match="--lr: expected a number above 0, got 0"):
        changed.replace(lr=0)


@pytest.mark.parametrize("kind", [Config, Ablation, Features, Doctor])
def test_help_has_a_box_per_section(kind: type[Sections], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"], kind, "prog")
    text = capsys.readouterr().out
    assert text.startswith("usage: prog ")
    for name, _ in kind.sections():
        assert f" {name} options " in text
    for name in kind.fields():
        assert f"--{name.replace('_', '-')}" in text


def test_every_option_has_a_help_text_of_one_paragraph() -> None:
    """tyro takes help texts from comments above fields, and breaks them before lines that do not start with a letter."""
    comments = {}
    for module in (config, data_options, method_options, tuning_options, ablation, features):
        lines = Path(str(module.__file__)).read_text().splitlines()
        for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
            if before.startswith("    #: ") and line.startswith("    #: "):
                assert line[7].isalpha(), line
            if line.startswith("    #: ") and not after.startswith("    #: "):
                comments[after.split(":")[0].strip()] = line
    assert comments.keys() == Config.fields().keys() | {"seeds", "vary", "table", "weights", "out", "json"}


def test_commands_take_the_options_that_they_use() -> None:
    assert {
        "data",
        "image_size",
        "backbone",
        "pretrained",
        "crop_size",
        "device",
        "threads",
    } < Features.fields().keys()
    assert Doctor.fields().keys() == Config.fields().keys()
    assert not {"lr", "methods", "stage1_epochs", "name", "seed", "precision"} & Features.fields().keys()
