"""`FirstStages`: each method reaches the bits of a run of its own, and no first stage is trained twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from train.__main__ import main
from train.training.trainer import Trainer

SHORT = "--stage1-epochs 2 --stage2-epochs 2 --classes-per-batch 3 --batch-size 50 --device cpu"
METHODS = (
    "cos-cb",
    "cos-cs-cb",
    "cos-gist",
    "gist",
    "gist-rotation",
    "gist-mlp",
    "gist-combined",
    "plain",
    "crt",
    "tau-norm",
)


def records(folder: Path) -> list[dict[str, Any]]:
    """Return the records without the values that depend on the clock or name the trained method."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    other = ("seconds", "images_per_second", "model_images_per_second", "first_stage_of")
    return [{key: value for key, value in line.items() if key not in other} for line in lines]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], int]:
    """Count the steps of each method and stage, by (method, stage)."""
    counts: dict[tuple[str, int], int] = {}
    step = Trainer.step

    def counted(trainer: Trainer) -> Any:
        at = (trainer.name, trainer.stage)
        counts[at] = counts.get(at, 0) + 1
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", counted)
    return counts


@pytest.mark.parametrize("kind", ["features", "images"])
def test_each_method_comes_to_the_bits_of_a_run_of_its_own(
    kind: str, image_file: Path, feature_file: Path, tmp_path: Path, steps: dict[tuple[str, int], int]
) -> None:
    file, recipe = (feature_file, "features") if kind == "features" else (image_file, "smoke")
    methods = METHODS if kind == "features" else ("cos-gist", "gist", "plain", "crt")
    args = f"--recipe {recipe} --data {file} --num-classes 5 --runs {tmp_path} {SHORT}".split()
    assert main([*args, "--name", "all", "--methods", *methods]) == 0
    first = {name for name, stage in steps if stage == 0}
    assert first == {"cos-cb", "cos-gist", "gist-combined", "plain"} & set(methods)
    assert not (tmp_path / "all" / "first-stages").exists()
    found = records(tmp_path / "all")
    for name in methods:
        assert main([*args, "--name", name, "--methods", name]) == 0
        model = f"model-{name}.safetensors"
        assert (tmp_path / "all" / model).read_bytes() == (tmp_path / name / model).read_bytes(), name
        assert records(tmp_path / name) == [record for record in found if record["method"] == name]


def test_a_run_stopped_within_a_second_stage_goes_on(
    feature_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: dict[tuple[str, int], int]
) -> None:
    args = (
        f"--recipe features --data {feature_file} --runs {tmp_path} {SHORT} --methods cos-gist gist".split()
    )
    assert main([*args, "--name", "whole"]) == 0
    counted = Trainer.step

    def stopping(trainer: Trainer) -> Any:
        if (trainer.name, trainer.stage, trainer.epoch) == stop:
            raise KeyboardInterrupt
        return counted(trainer)

    monkeypatch.setattr(Trainer, "step", stopping)
    for epoch in (0, 1):  # before GistNet's first checkpoint, and after it
        stop = ("gist", 1, epoch)
        name = f"stopped-{epoch}"
        assert main([*args, "--name", name]) == 130
        monkeypatch.setattr(Trainer, "step", counted)
        assert main([*args, "--name", name, "--resume"]) == 0
        monkeypatch.setattr(Trainer, "step", stopping)
        for method in ("cos-gist", "gist"):
            model = f"model-{method}.safetensors"
            assert (tmp_path / name / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()
        assert records(tmp_path / name) == records(tmp_path / "whole")
    assert ("gist", 0) not in steps


def test_values_of_options_are_runs_that_share_them(
    feature_file: Path, tmp_path: Path, steps: dict[tuple[str, int], int], capsys: pytest.CaptureFixture[str]
) -> None:
    args = (
        f"ablation --recipe features --data {feature_file} --runs {tmp_path} --name g {SHORT} --methods gist"
    )
    vary = ["--vary", "num-displacements=1,2", "displacement-init=random,residuals", "--seeds", "0", "7"]
    assert main([*args.split(), *vary]) == 0
    assert steps["gist", 0] * 4 == steps["gist", 1]  # once for each seed, not for each of four values
    table = (tmp_path / "g" / "table.md").read_text()
    for label, slots in (
        ("num-displacements=1, displacement-init=random", 2),
        ("num-displacements=2, displacement-init=residuals", 3),
    ):
        (row,) = (
            line for line in table.splitlines() if line.startswith(f"| GistNet (COS+CS+GIST), {label} |")
        )
        assert row.split(" | ")[5].count("/") == slots - 1
        assert records(tmp_path / "g" / label / "seed-7")[-1]["event"] == "result"
    before = dict(steps)
    assert main([*args.split(), *vary[:2], "3", *vary[3:]]) == 2
    assert "--vary: expected OPTION=VALUE" in capsys.readouterr().err
    more = ["--vary", "num-displacements=1,2,3", *vary[2:]]
    assert main([*args.split(), *more]) == 0
    assert steps["gist", 0] == before["gist", 0]
    assert steps["gist", 1] - before["gist", 1] == before["gist", 1] // 2, (
        "only what was not there is trained"
    )


def test_options_that_first_stages_depend_on_are_told_apart(
    feature_file: Path, tmp_path: Path, steps: dict[tuple[str, int], int]
) -> None:
    args = (
        f"ablation --recipe features --data {feature_file} --runs {tmp_path} {SHORT} --methods gist --seeds 0"
    )
    # With --balancing prior, as in this recipe, the loss of the first stage has the prior.
    assert main([*args.split(), "--vary", "lr=0.1,0.05", "prior-strength=1,0.5"]) == 0
    assert steps["gist", 0] == steps["gist", 1]


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("lr", "--vary: expected OPTION=VALUE,VALUE,…, each option once, got 'lr'"),
        ("rate=1", "--vary: expected the name of an option, got 'rate'"),
        ("lr=high", "--lr: expected float, got 'high'"),
        ("num-displacements=2.5", "--num-displacements: expected int, got '2.5'"),
        ("num-displacements=2,256", "--num-displacements: expected 0 to 255, got 256"),
        (
            "seed=1,2",
            "--vary: expected an option that influences results and is not set by the ablation, got 'seed'",
        ),
    ],
)
def test_what_cannot_be_varied(
    vary: str, message: str, feature_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = f"ablation --recipe features --data {feature_file} --runs {tmp_path} {SHORT}".split()
    assert main([*args, "--vary", vary]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.glob("*/*.toml"))
