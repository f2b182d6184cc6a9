"""Tests of the commands as a whole: help, errors, JSON on standard output, and shell completion."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from train.__main__ import main
from train.commands.table import COMMANDS
from train.data.dataset import Dataset
from train.distributed import ENVIRONMENT

from .short_runs import FEATURES
from .test_classifier import save_trained

SHORT = (
    "--recipe features --classes-per-batch 3 --stage1-epochs 1 --stage2-epochs 0 --methods plain --device cpu"
)


def printed_json(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> Any:
    """Run a command with --json and return the one object on standard output."""
    capsys.readouterr()
    assert main([*words, "--json"]) == code
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def help_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("given", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}])
def test_an_environment_of_several_processes_without_torchrun(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scripts for schedulers set WORLD_SIZE too, and not always the rest."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert main(["--recipe", "smoke"]) == 2
    missing = ", ".join(name for name in ENVIRONMENT if name not in given)
    assert capsys.readouterr().err == (
        "error: environment: expected WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT "
        f"as torchrun sets them, or no WORLD_SIZE for one process, got WORLD_SIZE=2 without {missing}\n"
    )


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(help_of([], capsys).split())
    for name, command in COMMANDS.items():
        assert command.line.endswith(".")
        assert f" {name}: {command.line}" in text
        assert command.line in " ".join(help_of([name], capsys).split())


@pytest.mark.parametrize(
    ("command", "own"), [("doctor", {"json"}), ("ablation", {"seeds", "vary", "table", "json"})]
)
def test_help_of_a_command_that_trains_lists_its_own_options(
    command: str, own: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of([command, "--recipe", "smoke"], capsys)
    assert (
        own
        <= set(re.findall(r"--([a-z][a-z-]*)", text))
        <= own | {"help", "no-json", "methods", "seed", "resume", "data", "hold-out"}
    )
    assert "`python -m train --help` lists" in " ".join(text.split())


@pytest.mark.parametrize(
    ("word", "first"), [("evalute", "evaluate"), ("Predict", "predict"), ("xyz", "doctor")]
)
def test_an_unknown_command_is_an_error(word: str, first: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word, "--data", "x.npz"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: expected options of a training run, or a command ({first}, ")
    assert line.endswith(f", got {word!r}")
    assert all(name in line for name in COMMANDS)


def completion(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Return the script of a shell's completion."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    capsys.readouterr()
    assert main(["completion", shell]) == 0
    script = tmp_path / f"completion.{shell}"
    script.write_text(capsys.readouterr().out, encoding="utf-8")
    return script


def complete(words: str, script: Path) -> list[str]:
    """Return how bash completes the last word."""
    listed = words.split(" ")
    ask = f"""
        source {script}
        COMP_WORDS=({" ".join(map(repr, listed))}) COMP_CWORD={len(listed) - 1}
        $(complete -p gistops-train | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        ((${{#COMPREPLY[@]}} == 0)) || printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    shown = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    return shown.stdout.splitlines()


def test_bash_completes_commands_options_and_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = completion("bash", tmp_path, capsys)
    assert COMMANDS.keys() <= {*complete("gistops-train ", script)}
    assert "--batch-size" in complete("gistops-train predict --b", script)
    assert {"onnx", "torch-export"} <= {*complete("gistops-train export --format ", script)}
    assert "--stage1-epochs" in complete("gistops-train --st", script)
    # Where the script has no word, bash completes paths.
    assert complete("gistops-train predict ru", script) == []
    words = ["bash", "-c", f"source {script}; complete -p gistops-train"]
    assert " -o default " in subprocess.run(words, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("words", "found"),
    [("pred", "predict"), ("export --format tor", "torch-export"), ("predict ru", "paths")],
)
def test_zsh_completes_commands_options_and_paths(
    words: str, found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Functions stand for those of zsh's line editor, which print what the script offers."""
    script = completion("zsh", tmp_path, capsys)
    offer = f"""
        _describe() {{ [[ ${{(P)2}} != : ]] && print -l -- ${{(P)2}} }}
        _files() {{ print paths }}
        words=(gistops-train {words}) CURRENT=$#words
        source {script}
    """
    shown = subprocess.run(["zsh", "-f", "-c", offer], capture_output=True, text=True, check=True)
    assert [line.partition(":")[0] for line in shown.stdout.splitlines()] == [found]
    assert shown.stderr == ""


def test_every_command_prints_one_object(
    feature_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [*SHORT.split(), "--data", str(feature_file), "--runs", str(tmp_path)]
    trained = printed_json([*run, "--name", "r"], capsys)
    assert trained["folder"] == str(tmp_path / "r")
    assert Path(trained["results"][0]["model"]).is_file()
    accuracy = trained["results"][0]["accuracy"]
    report = printed_json(["report", str(tmp_path / "r"), "--out", str(tmp_path / "r.html")], capsys)
    assert report["file"] == str(tmp_path / "r.html")
    (result,) = report["runs"][str(tmp_path / "r")]
    assert result["accuracy"] == accuracy
    examined = printed_json(["doctor", *run, "--name", "new"], capsys)
    assert examined["problems"] == []
    assert any("5 classes" in line for line in examined["description"])
    arrays = dict(np.load(feature_file))
    arrays["x_train"][0] = 0
    np.savez(tmp_path / "zero.npz", **arrays)
    examined = printed_json(["doctor", *run, "--data", str(tmp_path / "zero.npz")], capsys, code=1)
    assert examined["problems"] == ["1 training sample with features that are all zero"]

    ablation = ["ablation", *run, "--name", "a", "--seeds", "0", "1", "--vary", "lr=0.1,0.01"]
    table = printed_json(ablation, capsys)
    assert Path(table["table"]).is_file()
    assert [(row["variant"], row["method"]) for row in table["rows"]] == [
        ("lr=0.1", "plain"),
        ("lr=0.01", "plain"),
    ]
    for row in table["rows"]:
        overall = [row["seeds"][seed]["overall"] for seed in ("0", "1")]
        assert row["mean"]["overall"] == pytest.approx(np.mean(overall))
        assert row["deviation"]["overall"] == pytest.approx(np.std(overall, ddof=1))


def test_features_and_export_print_one_object(
    features: Dataset, image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train.data.sources.arrays import load_arrays

    from .short_runs import IMAGES

    model = save_trained(IMAGES, load_arrays(str(image_file)), tmp_path / "model")
    out = str(tmp_path / "features.safetensors")
    options = f"--recipe smoke --data {image_file} --num-classes 5 --device cpu --weights {model} --out {out}"
    written = printed_json(["features", *options.split()], capsys)
    assert written["file"] == out
    assert written["arrays"]["x_test"] == [100, 128]
    assert written["classes"] == list("01234")

    head = save_trained(FEATURES, features, tmp_path / "head")
    exported = ["export", str(head), "--format", "torch-export", "--out", str(tmp_path / "program")]
    written = printed_json(exported, capsys)
    assert written["sample_shape"] == [12]
    assert written["metadata"]["shot_groups"] == ["many", "medium", "medium", "few", "few"]
    with open(written["file"], "rb") as file:
        assert torch.export.load(file).module()(features.x_test).shape == (100, 5)
