"""--track: the trackers hold the records of metrics.jsonl, each once, also after a run was resumed.

Weights & Biases and MLflow are tested offline with the real libraries, or skip.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from train.__main__ import main
from train.checks import fill_in
from train.cli import parse_run
from train.run import load
from train.training.first_stages import FirstStages
from train.training.progress import Display
from train.training.run_folder import RunFolder
from train.training.trackers import Tracker, Trackers, scalars, scalars_of
from train.training.train_methods import train_methods

Points = dict[str, list[tuple[int, float]]]
SHORT = "--classes-per-batch 3 --stage1-epochs 2 --stage2-epochs 2 --batch-size 50 --device cpu"


def events(folder: Path) -> Points:
    """Return the steps and values of each tag in the event files of one method."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    found = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def points(folder: Path, method: str) -> Points:
    """Return the steps and values of each tag in the records of a method."""
    expected: Points = {}
    for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if record["method"] == method:
            for tag, value in scalars_of(record):
                expected.setdefault(tag, []).append((record["images"], value))
    return expected


class Stopped(RunFolder):
    """Fails after its third epoch, whose record is written, but not its checkpoint."""

    def save_checkpoint(self, *args: Any, **options: Any) -> None:
        if len(self.records) == 3:
            raise InterruptedError
        super().save_checkpoint(*args, **options)


def stop_after_three_epochs(args: list[str]) -> None:
    config = parse_run(args)
    data = load(config)
    config = fill_in(config, data)
    folder = Stopped(config)
    folder.path.mkdir(parents=True)
    folder.open(config, data)
    first_stages = FirstStages(folder.path, config, "")
    with Display(Console(quiet=True), 1, 0) as display, pytest.raises(InterruptedError):
        train_methods(config, data, folder, first_stages, display, None)
    folder.trackers.close()


def check(folder: Path, method: str) -> Points:
    """Check that the event files hold exactly the numbers of all records, as float32."""
    expected = {
        tag: [(step, float(np.float32(value))) for step, value in values]
        for tag, values in points(folder, method).items()
    }
    found = events(folder / "tensorboard" / method)
    assert found == expected
    return found


def test_tags_by_hand() -> None:
    record = {
        "event": "epoch",
        "epoch": 3,
        "loss": 0.5,
        "slot_usage": [0.75, 0.25],
        "displacement_norms": [2.0],
    }
    record |= {"accuracy": {"many": 0.5, "few": None}, "accuracy_of": {"both heads": {"few": 1.0}}}
    assert dict(scalars(record)) == {
        "epoch": 3,
        "loss": 0.5,
        "slot_usage/0": 0.75,
        "slot_usage/1": 0.25,
        "displacement_norms/1": 2.0,
        "accuracy/many": 0.5,
        "accuracy_of/both heads/few": 1.0,
    }


def test_events_are_the_records(feature_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    args = f"--recipe features --data {feature_file} --runs {tmp_path} {SHORT}".split()
    assert main([*args, "--name", "r", "--track", "tensorboard"]) == 0
    found = check(tmp_path / "r", "gist")
    assert len(found["loss"]) == 4
    for tag in ("lr", "loss_balanced", "loss_random", "images_per_second", "tau_balanced", "tau_random"):
        assert len(found[tag]) == 4
    assert len(found["slot_usage/4"]) == len(found["displacement_norms/4"]) == 2  # of the second stage
    assert {"accuracy/overall", "accuracy/many", "accuracy/medium", "accuracy/few"} <= found.keys()
    assert "slot_usage/0" not in check(tmp_path / "r", "plain")
    assert main([*args, "--name", "without"]) == 0
    assert not (tmp_path / "without" / "tensorboard").exists()
    for model in ("model-gist.safetensors", "model-plain.safetensors"):
        assert (tmp_path / "r" / model).read_bytes() == (tmp_path / "without" / model).read_bytes()


def test_a_resumed_run_shows_each_epoch_once(feature_file: Path, tmp_path: Path) -> None:
    """Stopped between two checkpoints, so that an epoch is trained again; then resumed with and without the option."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    args = f"--recipe features --data {feature_file} --runs {tmp_path} --name r {SHORT}".split()
    stop_after_three_epochs([*args, "--track", "tensorboard"])
    assert len(check(tmp_path / "r", "gist")["loss"]) == 3

    assert main([*args, "--resume", "--track", "tensorboard"]) == 0
    assert len(check(tmp_path / "r", "gist")["loss"]) == 4
    assert len(check(tmp_path / "r", "plain")["loss"]) == 4
    # A run may be resumed with or without the option, and the event files hold all of its records.
    before = events(tmp_path / "r" / "tensorboard" / "plain")
    assert main([*args, "--resume"]) == 0
    assert events(tmp_path / "r" / "tensorboard" / "plain") == before
    assert main([*args, "--resume", "--track", "tensorboard"]) == 0
    check(tmp_path / "r", "gist")
    assert "track" not in (tmp_path / "r" / "config.toml").read_text()


def test_a_missing_tensorboard_is_named(
    feature_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    args = f"--recipe features --data {feature_file} --runs {tmp_path / 'runs'} {SHORT}".split()
    assert main([*args, "--track", "tensorboard"]) == 2
    message = capsys.readouterr().err
    assert "--track: expected the package tensorboard, which `pip install '.[tensorboard]'` brings" in message
    assert len(message.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()
    assert main([*args, "--methods", "plain"]) == 0


def wandb_records(file: Path) -> list[Any]:
    """Return the records of a file of wandb, which its service writes a little later than a run ends."""
    for _ in range(2000):
        records = read_wandb(file)
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.1)
    pytest.fail(f"{file} has no end")


def read_wandb(file: Path) -> list[Any]:
    """Return the records of a file of wandb: those of LevelDB's log, after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, part, records = file.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:  # of the block
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            records.append(Record.FromString(part))
            part = b""
    return records


def wandb_points(folder: Path, method: str) -> tuple[set[str], Points]:
    """Return the ids of a method's runs in all files of wandb, and their steps and values by tag."""
    ids, found = set(), {}
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        records = wandb_records(file)
        (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
        if run.display_name != f"r/{method}":
            continue
        ids.add(run.run_id)
        assert run.run_group == "r"
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert (config["method"], config["backbone"]) == (method, "none")
        for record in records:
            if record.WhichOneof("record_type") == "history":
                for item in record.history.item:
                    tag = "/".join(item.nested_key) or item.key
                    if not tag.startswith("_"):
                        value = (record.history.step.num, json.loads(item.value_json))
                        found.setdefault(tag, []).append(value)
    return ids, found


def untimed(values: Points) -> Points:
    """Return the values without times and speeds, which differ when an epoch is trained again."""
    return {tag: value for tag, value in values.items() if "second" not in tag}


def test_wandb_continues_the_run_of_each_method(
    feature_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after an epoch that is trained again; its numbers are not sent again."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    args = f"--recipe features --data {feature_file} --runs {tmp_path} --name r --track wandb {SHORT}".split()
    stop_after_three_epochs(args)
    assert len(wandb_points(tmp_path / "r", "gist")[1]["loss"]) == 3
    assert main([*args, "--resume"]) == 0
    for method in ("gist", "plain"):
        ids, found = wandb_points(tmp_path / "r", method)
        assert len(ids) == 1
        assert untimed(found) == untimed(points(tmp_path / "r", method))
        assert len(found["result/accuracy/overall"]) == 1
    files = set(tmp_path.rglob("*.wandb"))
    assert main([*args, "--resume"]) == 0
    assert set(tmp_path.rglob("*.wandb")) == files


@pytest.mark.parametrize("store", ["file", "sqlite"])
def test_mlflow_continues_the_run_of_each_method(
    store: str, feature_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The option is new after three epochs, whose numbers are sent then; the last one is trained again."""
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    if store == "sqlite":
        pytest.importorskip("sqlalchemy", reason="mlflow-skinny has no databases")
        pytest.importorskip("alembic", reason="mlflow-skinny has no databases")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}" if store == "sqlite" else (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "birds, Ärzte")
    args = f"--recipe features --data {feature_file} --runs {tmp_path} --name r {SHORT}".split()
    stop_after_three_epochs([*args, *(["--track", "mlflow"] if store == "file" else [])])
    args += ["--resume", "--track", "mlflow"]
    assert main(args) == 0
    assert main(args) == 0  # is finished, and sends nothing again
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("birds, Ärzte").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert sorted(runs) == ["r/gist", "r/plain"]
    for method in ("gist", "plain"):
        run = runs[f"r/{method}"]
        assert run.info.status == "FINISHED"
        assert run.data.params["stage1_epochs"] == "2"
        assert run.data.params["method"] == method
        expected = points(tmp_path / "r", method)
        assert len(run.data.metrics) == len(expected)
        for tag in ("loss", "result/accuracy/overall"):
            history = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, tag)]
            assert history == expected[tag]
    assert "accuracy_of/random head_ adjusted/few" in runs["r/gist"].data.metrics


def test_a_failing_tracker_is_a_warning_and_the_run_goes_on(
    feature_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file lies where TensorBoard's folder would be."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "tensorboard").write_text("")
    args = (
        f"--recipe features --data {feature_file} --runs {tmp_path} --name r --methods plain {SHORT}".split()
    )
    assert main([*args, "--track", "tensorboard"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("warning: --track tensorboard: the run goes on without it (") == 1
    assert "result/accuracy/overall" in points(tmp_path / "r", "plain")


def test_an_interrupt_is_no_failure_of_a_tracker() -> None:
    class Interrupted(Tracker):
        """Is interrupted by the user."""

        def restart(self, records: list[dict[str, Any]]) -> None:
            raise KeyboardInterrupt

        append = close = restart  # type: ignore[assignment]

    with pytest.raises(KeyboardInterrupt):
        Trackers({"t": Interrupted()}).restart([])
