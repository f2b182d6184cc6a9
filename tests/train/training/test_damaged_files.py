"""Files of a run that are truncated: an error in one line names the file and says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from train.__main__ import main
from train.model import load_model
from train.model.model import ModelFileError
from train.trained import load_trained
from train.training.checkpoint import DamagedFileError, load_torch, save_torch

SHORT = "--recipe features --methods plain --device cpu --stage1-epochs 1 --stage2-epochs 0 --name r"


def truncate(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
def test_truncated_files_of_torch(share: float, tmp_path: Path) -> None:
    save_torch({"training": torch.arange(10000), "records": []}, tmp_path / "a.pt")
    assert load_torch(tmp_path / "a.pt", "training", "records").keys() == {"training", "records"}
    with pytest.raises(DamagedFileError, match=r"a\.pt, which is damaged \(no data in it\)"):
        load_torch(tmp_path / "a.pt", "data")
    truncate(tmp_path / "a.pt", share)
    with pytest.raises(DamagedFileError, match=r"a\.pt, which is damaged \(\w+: .") as refused:
        load_torch(tmp_path / "a.pt", "training")
    assert "\n" not in str(refused.value)


def test_a_run_names_its_truncated_checkpoint_and_model(
    feature_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SHORT.split(), "--data", str(feature_file), "--runs", str(tmp_path)]
    assert main(words) == 0
    checkpoint, model = tmp_path / "r" / "checkpoint.pt", tmp_path / "r" / "model-plain.safetensors"
    if not checkpoint.exists():  # a finished run
        save_torch({"training": {}, "records": [], "data": ""}, checkpoint)
    truncate(checkpoint, 0.5)
    capsys.readouterr()
    assert main([*words, "--resume"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"error: --resume: expected a whole checkpoint, got {checkpoint}, which is damaged ("
    )
    assert line.endswith("; put a copy in its place, or delete it to train from the beginning")
    checkpoint.unlink()
    assert main([*words, "--resume"]) == 0

    truncate(model, 0.5)
    for load in (load_model, load_trained):
        with pytest.raises(ModelFileError, match=r"got .*model-plain\.safetensors, which is damaged or"):
            load(model)
