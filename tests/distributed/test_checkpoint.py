"""Checkpoints: any number of processes, what a load picks, and the formats of `torch.distributed.checkpoint`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.testing import assert_close

from gistops.distributed import load_checkpoint, save_checkpoint
from gistops.nn import ConstellationClassifier, GistClassifier

from ..processes import in_group
from .training import HEADS, STEPS, make, train, train_in_turns

EXACT = {"rtol": 0.0, "atol": 0.0}


def trained(case: str, seed: int) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    model, optimizers = make(case, seed)
    train(case, seed, model, optimizers, 0, 2)
    return model, optimizers


def states(optimizers: list[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    return [optimizer.state_dict() for optimizer in optimizers]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.cpu
def test_training_continues_with_another_number_of_processes(tmp_path: Path, seed: int) -> None:
    """2, 3, 1 and 4 processes in turn train as one process without a process group does without interruption."""
    sizes = (2, 3, 1, 4)
    in_group(train_in_turns, max(sizes), tmp_path, sizes, seed, tmp_path)
    for case in HEADS:
        model, optimizers = make(case, seed)
        for turn in range(len(sizes)):
            train(case, seed, model, optimizers, turn * STEPS, (turn + 1) * STEPS)
            loaded, loaded_optimizers = make(case, seed + 1)
            extra = load_checkpoint(tmp_path / f"turn-{turn}" / case, loaded, loaded_optimizers)
            assert extra == {"step": (turn + 1) * STEPS}
            assert_close(loaded.state_dict(), model.state_dict(), rtol=1e-12, atol=1e-12)
            for found, expected in zip(states(loaded_optimizers), states(optimizers), strict=True):
                assert_close(found["state"], expected["state"], rtol=1e-12, atol=1e-12)
                assert found["param_groups"] == expected["param_groups"]


@pytest.mark.parametrize("case", HEADS)
def test_a_load_restores_every_bit(case: str, tmp_path: Path, seed: int) -> None:
    model, optimizers = trained(case, seed)
    save_checkpoint(tmp_path, model, optimizers)
    loaded, loaded_optimizers = trained(case, seed + 1)
    assert load_checkpoint(tmp_path, loaded, loaded_optimizers) == {}
    assert_close(loaded.state_dict(), model.state_dict(), **EXACT)
    assert_close(states(loaded_optimizers), states(optimizers), **EXACT)


def test_an_optimizer_before_its_first_step_stays_so(tmp_path: Path, seed: int) -> None:
    """No save or load takes a step to create the state; a state that was never there is absent after the load."""
    model, optimizers = make("gist", seed)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_checkpoint(tmp_path, model, optimizers)
    assert_close(model.state_dict(), before, **EXACT)
    assert optimizers[0].state_dict()["state"] == {}
    loaded, loaded_optimizers = trained("gist", seed)
    load_checkpoint(tmp_path, loaded, loaded_optimizers)
    assert loaded_optimizers[0].state_dict()["state"] == {}


def test_options_of_the_implementation_are_not_loaded(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    scheduled = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9, fused=True)
    torch.optim.lr_scheduler.StepLR(scheduled, 1)  # adds initial_lr
    save_checkpoint(tmp_path, model, scheduled)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, foreach=True)
    load_checkpoint(tmp_path, model, optimizer)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["initial_lr"], group["momentum"]) == (0.5, 0.5, 0.9)
    assert (group["foreach"], group["fused"]) == (True, None)


def test_names_have_no_prefixes_of_wrappers(tmp_path: Path, seed: int) -> None:
    model, optimizers = trained("rotation", seed)
    model.backbone.compile()  # in-place, without a prefix
    save_checkpoint(tmp_path, torch.compile(model), optimizers)
    loaded, loaded_optimizers = make("rotation", seed + 1)
    loaded.backbone = torch.compile(loaded.backbone)
    load_checkpoint(tmp_path, loaded, loaded_optimizers)
    assert_close(loaded.head.state_dict(), model.head.state_dict(), **EXACT)
    assert_close(states(loaded_optimizers), states(optimizers), **EXACT)


def test_values_are_converted_to_the_dtype_of_the_model(tmp_path: Path) -> None:
    head = ConstellationClassifier(4, 3, 2)
    save_checkpoint(tmp_path, head)
    half = ConstellationClassifier(4, 3, 2, dtype=torch.bfloat16)
    load_checkpoint(tmp_path, half)
    assert_close(half.state_dict(), head.to(torch.bfloat16).state_dict(), **EXACT)


def test_extra_keeps_its_types(tmp_path: Path) -> None:
    extra = {"epoch": 3, "milestones": {30: 1}, "empty": {}, "a.b": None, "pair": (1, "x")}
    save_checkpoint(tmp_path, nn.Linear(1, 1), extra=extra | {"sums": torch.ones(2)})
    loaded = load_checkpoint(tmp_path, nn.Linear(1, 1))
    assert_close(loaded.pop("sums"), torch.ones(2), **EXACT)
    assert loaded == extra


class TestFolders:
    def test_the_last_complete_checkpoint_stays_and_is_loaded(self, tmp_path: Path) -> None:
        model, run = nn.Linear(1, 1), tmp_path / "new" / "run"
        (tmp_path / "new").mkdir()
        for number in range(1, 12):  # "checkpoint-9" would be the last by name
            assert save_checkpoint(run, model, extra={"number": number}) == run / f"checkpoint-{number}"
            assert names(run) == [f"checkpoint-{number}"]
        assert load_checkpoint(run, model) == {"number": 11}

    def test_incomplete_checkpoints_are_ignored_and_removed_by_the_next_save(self, tmp_path: Path) -> None:
        model = nn.Linear(1, 1)
        shutil.copytree(save_checkpoint(tmp_path, model, extra={"number": 1}), tmp_path / "checkpoint-7")
        (tmp_path / "checkpoint-7" / ".metadata").rename(tmp_path / "checkpoint-7" / ".metadata.tmp")
        assert load_checkpoint(tmp_path, model) == {"number": 1}
        save_checkpoint(tmp_path, model, extra={"number": 2})
        assert names(tmp_path) == ["checkpoint-8"]

    def test_a_renamed_checkpoint_is_kept_and_can_be_loaded(self, tmp_path: Path) -> None:
        model = nn.Linear(1, 1)
        save_checkpoint(tmp_path, model, extra={"number": 1}).rename(tmp_path / "best")
        (tmp_path / "checkpoint-notes.txt").touch()
        save_checkpoint(tmp_path, model, extra={"number": 2})
        assert names(tmp_path) == ["best", "checkpoint-1", "checkpoint-notes.txt"]
        assert load_checkpoint(tmp_path, model) == {"number": 2}
        assert load_checkpoint(tmp_path / "best", model) == {"number": 1}

    def test_of_a_link_only_the_link_is_removed(self, tmp_path: Path) -> None:
        model, run, elsewhere = nn.Linear(1, 1), tmp_path / "run", tmp_path / "elsewhere"
        save_checkpoint(run, model, extra={"number": 1}).rename(elsewhere)
        (run / "checkpoint-1").symlink_to(elsewhere)
        assert load_checkpoint(run, model) == {"number": 1}
        save_checkpoint(run, model, extra={"number": 2})
        assert names(run) == ["checkpoint-2"]
        assert load_checkpoint(elsewhere, model) == {"number": 1}

    def test_files_may_have_the_names_of_checkpoints(self, tmp_path: Path) -> None:
        model = nn.Linear(1, 1)
        (tmp_path / "checkpoint-1").touch()
        (tmp_path / "checkpoint-2").symlink_to(tmp_path / "nothing")
        assert save_checkpoint(tmp_path, model).name == "checkpoint-3"
        assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


class TestDisplacements:
    """The number of displacements follows the checkpoint, as with `load_state_dict`."""

    @pytest.mark.parametrize(("saved", "present"), [(3, 0), (3, 2), (0, 3)])
    @pytest.mark.parametrize("transform", ["translation", "rotation", "mlp"])
    def test_another_number_is_adapted(
        self, saved: int, present: int, transform: Any, tmp_path: Path
    ) -> None:
        model = nn.ModuleDict({"head": GistClassifier(4, 3, saved, transform=transform)})
        loaded = nn.ModuleDict({"head": GistClassifier(4, 3, present, transform=transform)})
        save_checkpoint(tmp_path, model)
        load_checkpoint(tmp_path, loaded)
        assert_close(loaded.state_dict(), model.state_dict(), **EXACT)
        assert loaded["head"].displacements.requires_grad == (saved > 0)

    def test_another_number_is_refused_with_an_optimizer(self, tmp_path: Path) -> None:
        head = ConstellationClassifier(4, 3, 2)
        save_checkpoint(tmp_path, head, torch.optim.SGD(head.parameters()))
        other = ConstellationClassifier(4, 3)
        before = other.centers.detach().clone()
        with pytest.raises(
            ValueError, match=r"optimizer: expected None, .*checkpoint-1 .*ConstellationClassifier"
        ):
            load_checkpoint(tmp_path, other, torch.optim.SGD(other.parameters()))
        assert torch.equal(other.centers, before)
        load_checkpoint(tmp_path, other)
        load_checkpoint(tmp_path, other, torch.optim.SGD(other.parameters()))


class TestTorch:
    """The entries are those of plain `torch.distributed.checkpoint`."""

    OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)

    def state(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
        optimizer = get_optimizer_state_dict(model, optimizers, options=self.OPTIONS)
        return {"model": get_model_state_dict(model), "optimizer": optimizer}

    @pytest.mark.parametrize("case", ["rotation", "gist"])
    def test_torch_reads_them(self, case: str, tmp_path: Path, seed: int) -> None:
        model, optimizers = trained(case, seed)
        path = save_checkpoint(tmp_path, model, optimizers)
        state = self.state(*trained(case, seed + 1))
        dcp.load(state, checkpoint_id=path)
        assert_close(state, self.state(model, optimizers), **EXACT)

    @pytest.mark.parametrize("case", ["rotation", "gist"])
    def test_those_of_torch_are_loaded(self, case: str, tmp_path: Path, seed: int) -> None:
        model, optimizers = trained(case, seed)
        dcp.save(self.state(model, optimizers), checkpoint_id=tmp_path / "by-torch")
        loaded, loaded_optimizers = make(case, seed + 1)
        assert load_checkpoint(tmp_path / "by-torch", loaded, loaded_optimizers) == {}
        assert_close(loaded.state_dict(), model.state_dict(), **EXACT)
        assert_close(states(loaded_optimizers), states(optimizers), **EXACT)
