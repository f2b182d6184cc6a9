"""Errors of checkpoints: each names the argument or file, what was expected and what came, on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.testing import assert_close

from gistops.distributed import load_checkpoint, save_checkpoint, shard_classes
from gistops.nn import ConstellationClassifier

from ..processes import in_group


def head(classes: int = 3) -> ConstellationClassifier:
    return ConstellationClassifier(4, classes, 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a checkpoint of a head with an optimizer."""
    saved = head()
    save_checkpoint(tmp_path / "run", saved, SGD(saved.parameters(), 0.1, momentum=0.9))
    return tmp_path / "run"


def check_refused(error: type[Exception], match: str, folder: Path, model: nn.Module, *more: Any) -> None:
    """Check that a load raises the error and changes no value of the model."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=match):
        load_checkpoint(folder, model, *more)
    assert_close(model.state_dict(), before, rtol=0, atol=0)


class TestFolder:
    def test_there_is_none(self, tmp_path: Path) -> None:
        check_refused(
            FileNotFoundError, r"folder: expected a folder .*got .*/none, which", tmp_path / "none", head()
        )

    def test_it_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        check_refused(FileNotFoundError, "folder: expected a folder", tmp_path / "file", head())
        with pytest.raises(NotADirectoryError, match=r"folder: expected a folder, got the file .*/file"):
            save_checkpoint(tmp_path / "file", head())

    def test_it_is_empty(self, tmp_path: Path) -> None:
        check_refused(FileNotFoundError, r"complete checkpoint in .*, got none", tmp_path, head())

    def test_no_checkpoint_in_it_is_complete(self, folder: Path) -> None:
        (folder / "checkpoint-1" / ".metadata").unlink()
        check_refused(FileNotFoundError, r"got only checkpoint-1 without \.metadata", folder, head())

    def test_its_metadata_is_damaged(self, folder: Path) -> None:
        (folder / "checkpoint-1" / ".metadata").write_bytes(b"damaged")
        check_refused(
            RuntimeError, r"folder: expected metadata .*checkpoint-1/\.metadata, got Unp", folder, head()
        )

    def test_a_file_in_it_is_lost(self, folder: Path) -> None:
        (folder / "checkpoint-1" / "__0_0.distcp").unlink()
        with pytest.raises(
            RuntimeError, match=r"folder: rank 0 could not load .*checkpoint-1: FileNotFoundError"
        ) as info:
            load_checkpoint(folder, head())
        assert isinstance(info.value.__cause__, FileNotFoundError)

    def test_it_cannot_be_written_to(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(
            RuntimeError, match=r"rank 0 could not save .*checkpoint-2: OSError: .*No space left"
        ) as info:
            save_checkpoint(folder, head())
        assert isinstance(info.value.__cause__, OSError)
        monkeypatch.undo()
        load_checkpoint(folder, head())


class TestModel:
    def test_it_has_other_classes(self, folder: Path) -> None:
        match = r"model: it does not match .*/checkpoint-1: centers: expected \[9, 4\], the checkpoint has \[3, 4\]"
        check_refused(ValueError, match, folder, head(9))

    def test_it_has_other_features(self, folder: Path) -> None:
        match = r"displacements: expected \[2, 5\], the checkpoint has \[2, 4\]"
        check_refused(ValueError, match, folder, ConstellationClassifier(5, 3, 2))

    def test_it_has_other_names(self, folder: Path) -> None:
        model = nn.ModuleDict({"head": head()})
        match = "head.centers is not in the checkpoint.* centers is in the checkpoint alone"
        check_refused(ValueError, match, folder, model)

    def test_not_strict_loads_common_names(self, folder: Path) -> None:
        class Scaled(ConstellationClassifier):
            def __init__(self) -> None:
                super().__init__(4, 3, 2)
                self.scale = nn.Parameter(torch.ones(1))

        model, saved = Scaled(), head()
        check_refused(ValueError, "scale is not in the checkpoint", folder, model)
        optimizer = SGD(model.parameters(), 0.5)
        load_checkpoint(folder, saved)
        load_checkpoint(folder, model, optimizer, strict=False)
        assert torch.equal(model.centers, saved.centers)
        assert optimizer.param_groups[0]["lr"] == 0.1

    def test_it_is_on_the_meta_device(self, folder: Path) -> None:
        with pytest.raises(
            ValueError, match="model: expected tensors with values, got the meta device for centers"
        ):
            load_checkpoint(folder, ConstellationClassifier(4, 3, 2, device="meta"))

    def test_it_is_none(self, folder: Path) -> None:
        for call in (save_checkpoint, load_checkpoint):
            with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
                call(folder, {})  # type: ignore[arg-type]


class TestOptimizer:
    def test_none_was_saved(self, tmp_path: Path) -> None:
        model = head()
        save_checkpoint(tmp_path, model)
        match = r"optimizer: it does not match .*checkpoint-1: expected None, because"
        check_refused(ValueError, match, tmp_path, model, SGD(model.parameters()))

    def test_it_has_other_parameters(self, folder: Path) -> None:
        model = head()
        match = "displacements is in the checkpoint's alone"
        check_refused(ValueError, match, folder, model, SGD([model.centers, model.raw_tau]))

    def test_it_is_of_another_model(self, folder: Path) -> None:
        for call in (save_checkpoint, load_checkpoint):
            with pytest.raises(
                ValueError, match=r"optimizer: expected parameters of the model, .*\[3, 4\], at position 0"
            ):
                call(folder, head(), SGD(head().parameters()))

    def test_it_is_of_another_class(self, folder: Path) -> None:
        model = head()
        match = "optimizer: .*expected options of Adam for centers, the checkpoint has .*momentum.* and lacks .*betas"
        check_refused(ValueError, match, folder, model, torch.optim.Adam(model.parameters()))

    def test_two_have_a_parameter(self, folder: Path) -> None:
        model = head()
        with pytest.raises(ValueError, match="expected each parameter in one optimizer, got raw_tau in two"):
            save_checkpoint(folder, model, [SGD(model.parameters()), AdamW([model.raw_tau])])

    def test_options_differ_within_a_group(self, tmp_path: Path) -> None:
        model = head()
        groups = [{"params": [model.centers], "lr": 0.5}, {"params": [model.displacements, model.raw_tau]}]
        save_checkpoint(tmp_path, model, SGD(groups, 0.1))
        match = (
            "optimizer: expected one lr for parameter group 0, the checkpoint has 0.5 for centers and 0.1 for"
        )
        with pytest.raises(ValueError, match=match):
            load_checkpoint(tmp_path, model, SGD(model.parameters()))

    def test_its_state_cannot_be_saved(self, tmp_path: Path) -> None:
        model = nn.Linear(2, 2)
        optimizer = SGD(model.parameters())
        optimizer.state[model.weight]["history"] = [torch.ones(2)]
        with pytest.raises(TypeError, match="numbers in the state of weight, got a list for 'history'"):
            save_checkpoint(tmp_path, model, optimizer)

    def test_it_is_none(self, folder: Path) -> None:
        for wrong in (3, [nn.Linear(1, 1)]):
            with pytest.raises(
                TypeError, match=r"optimizer: expected a torch\.optim\.Optimizer or several, got"
            ):
                load_checkpoint(folder, head(), wrong)  # type: ignore[arg-type]


def test_extra_is_a_dict(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="extra: expected a dict or None, got list"):
        save_checkpoint(tmp_path, head(), extra=[])  # type: ignore[arg-type]


def check_in_group(rank: int, folder: Path) -> None:
    """Check errors and what ranks share with two processes."""
    run = folder / "run"
    sharded = shard_classes(head(classes=5))
    with pytest.raises(FileNotFoundError, match="which is none"):
        load_checkpoint(run, sharded)
    with pytest.raises(TypeError, match="extra: expected a dict or None, got int"):  # on the other rank too
        save_checkpoint(run, sharded, extra=3 if rank else {})  # type: ignore[arg-type]
    save_checkpoint(run, sharded, SGD(sharded.parameters(), 0.1))
    check_refused_on_all(
        lambda: load_checkpoint(run, shard_classes(head(classes=6))),
        ValueError,
        r"centers: expected \[6, 4\]",
    )
    plain = head(classes=5 + rank)  # fits on rank 0
    check_refused_on_all(lambda: load_checkpoint(run, plain), ValueError, r"centers: expected \[6, 4\]")
    _check_displacements(run, sharded)
    _check_replicated(rank, folder / "replicated")
    if rank == 1:
        (run / "checkpoint-1" / "__1_0.distcp").unlink()
    dist.barrier()
    check_refused_on_all(
        lambda: load_checkpoint(run, sharded), RuntimeError, "rank 1 could not load .*__1_0.distcp"
    )
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:  # as on a machine with a disk of its own
            patch.setattr(Path, "is_dir", lambda _: False)
        check_refused_on_all(
            lambda: save_checkpoint(run, sharded),
            FileNotFoundError,
            "a file system that all ranks share, but .*checkpoint-2",
        )


def check_refused_on_all(call: Callable[[], object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
    dist.barrier()


def _check_replicated(rank: int, folder: Path) -> None:
    """Check that values that differ between ranks are saved as those of rank 0, as buffers under DDP must be."""
    model = nn.BatchNorm1d(4)
    for value in model.state_dict().values():
        value.fill_(rank)
    save_checkpoint(folder, model, extra={"rank": rank})
    assert load_checkpoint(folder, model) == {"rank": 0}
    assert not any(value.any() for value in model.state_dict().values())


def _check_displacements(run: Path, sharded: ConstellationClassifier) -> None:
    """Load the sharded head into sharded heads with other numbers of displacements."""
    for present in (0, 3):
        other = shard_classes(ConstellationClassifier(4, 5, present))
        with pytest.raises(ValueError, match="optimizer: expected None"):
            load_checkpoint(run, other, SGD(other.parameters()))
        load_checkpoint(run, other)
        load_checkpoint(run, other, SGD(other.parameters()))
        for name, value in sharded.state_dict().items():
            found: Any = other.state_dict()[name]
            assert found.placements == value.placements
            assert torch.equal(found.full_tensor(), value.full_tensor())
            assert isinstance(value, Tensor)


@pytest.mark.cpu
def test_ranks_raise_and_load_alike(tmp_path: Path) -> None:
    in_group(check_in_group, 2, tmp_path, tmp_path)
