"""--tune and --layer-decay: what is trained, what stays to the bit, and model files."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from train import footprint
from train.__main__ import main
from train.checks import problems_of
from train.config import Config, ConfigError
from train.data.dataset import Dataset
from train.data.sources.arrays import load_arrays
from train.model.model import load_model, save_model
from train.training.trainer import Trainer

from ..short_runs import FEATURES, IMAGES, check_resuming, equal, finish
from ..timm_networks import import_or_skip

VIT = IMAGES.replace(backbone="timm/test_vit", crop_padding=0, max_steps_per_epoch=2, batch_size=8, samples_per_class=1,
    stage1_epochs=1, stage2_epochs=1, optimizer="adamw", lr=0.01, crt_epochs=1,
)  # fmt: skip


@pytest.fixture
def large_images(arrays: dict[str, np.ndarray], tmp_path: Path) -> Dataset:
    """The images at the 160×160 pixels of timm's smallest transformer."""
    for name in ("x_train", "x_test"):
        arrays[name] = arrays[name].repeat(16, 1).repeat(16, 2)
    arrays = {name: array[:20] if "test" in name else array for name, array in arrays.items()}
    np.savez(tmp_path / "large.npz", **arrays)
    return load_arrays(str(tmp_path / "large.npz"))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def check_trained(method: str, config: Config, data: Dataset, trained: set[str]) -> Trainer:
    """Train one stage; assert that exactly the named tensors of the backbone change, and no others have optimizer state."""
    trainer = Trainer(method, config, data)
    before = state_of(trainer.model.backbone)
    finish(trainer, trainer.steps_per_epoch)
    trainer.evaluate()  # which switches to the training mode again
    trainer.step()
    assert changed(before, trainer.model.backbone.state_dict()) == trained
    parameters = dict(trainer.model.backbone.named_parameters())
    for name, parameter in parameters.items():
        assert (parameter.grad is not None) == parameter.requires_grad == (name in trained)
        assert (parameter in trainer.optimizer.state) == (name in trained)
    return trainer


def names(module: nn.Module, *parts: str) -> set[str]:
    return {name for name in module.state_dict() if any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("tune", "parts"),
    [("head", ()), ("norm", ("bn",)), ("last-1", ("layer3.0",)), ("last-2", ("layer2.0", "layer3.0"))],
)
def test_the_drivers_own_networks(tune: str, parts: tuple[str, ...], images: Dataset) -> None:
    config = IMAGES.replace(tune=tune)
    backbone = Trainer("gist", config, images).model.backbone
    trainer = check_trained("gist", config, images, names(backbone, *parts))
    assert trainer.model.center.num_batches_tracked > 0  # the layer before the head is none of the backbone's


@pytest.mark.parametrize(
    ("tune", "parts"),
    [
        ("head", ()),
        ("norm", ("norm",)),
        ("last-1", ("blocks.5.", "network.norm.")),
        ("lora", ("lora_",)),
    ],
)
def test_a_transformer(tune: str, parts: tuple[str, ...], large_images: Dataset) -> None:
    import_or_skip("timm")
    if tune == "lora":
        import_or_skip("peft")
    config = VIT.replace(tune=tune)
    backbone = Trainer("gist", config, large_images).model.backbone
    check_trained("gist", config, large_images, names(backbone, *parts))


@pytest.mark.parametrize(("method", "tune"), [("gist", "last-1"), ("crt", "norm"), ("lfme", "head")])
def test_goes_on_to_the_same_bits(method: str, tune: str, images: Dataset, seed: int) -> None:
    config = IMAGES.replace(tune=tune, crt_epochs=1, optimizer="adamw", lr=1e-3)
    check_resuming(method, config, images, random.Random(seed).randrange(1, 14))


def test_a_transformer_with_low_rank_updates_and_layer_decay_goes_on_to_the_same_bits(
    large_images: Dataset,
) -> None:
    import_or_skip("timm")
    import_or_skip("peft")
    config = VIT.replace(tune="lora", layer_decay=0.5)
    check_resuming("gist", config, large_images, 3)


def test_a_model_file_holds_merged_updates_and_needs_no_peft(large_images: Dataset, tmp_path: Path) -> None:
    import_or_skip("timm")
    import_or_skip("peft")
    trainer = Trainer("gist", VIT.replace(tune="lora", lora_rank=2), large_images)
    finish(trainer)
    updates = names(trainer.model.backbone, "lora_B")
    assert all(trainer.model.backbone.state_dict()[name].any() for name in updates)
    save_model(tmp_path / "m.safetensors", trainer.model, large_images.class_names)
    loaded, _ = load_model(tmp_path / "m.safetensors")
    trainer.model.eval()
    with torch.no_grad():
        x = large_images.x_test
        torch.testing.assert_close(loaded.features(x), trainer.model.features(x), rtol=1e-4, atol=1e-4)
        plain = loaded.backbone.state_dict()
    assert not names(loaded.backbone, "lora")
    assert {name for name in plain if "qkv.weight" in name}
    code = "import sys; import tests.train.timm_networks as t; t.import_or_skip('timm'); from train.model import load_model"
    code += f"; load_model({str(tmp_path / 'm.safetensors')!r}); assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_the_recipe_for_pretrained_transformers(large_images: Dataset, tmp_path: Path) -> None:
    """All of the recipe but its network and its weights: a small transformer with random ones."""
    import_or_skip("timm")
    import_or_skip("peft")
    smaller = "--backbone timm/test_vit --no-pretrained --crop-size 160 --batch-size 8 --classes-per-batch 4"
    short = "--samples-per-class 1 --max-steps-per-epoch 1 --stage1-epochs 1 --stage2-epochs 1 --device cpu"
    words = (
        f"--recipe foundation --data {tmp_path / 'large.npz'} --runs {tmp_path} --name r {smaller} {short}"
    )
    assert main(words.split()) == 0
    for method in ("gist", "cos-balanced-softmax"):
        model, classes = load_model(tmp_path / "r" / f"model-{method}.safetensors")
        with torch.no_grad():
            assert model(large_images.x_test).shape == (20, len(classes))


def test_layers_before_the_last_learn_more_slowly(large_images: Dataset) -> None:
    import_or_skip("timm")
    config = VIT.replace(layer_decay=0.5, backbone_lr=0.1)
    trainer = Trainer("plain", config, large_images)
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    decays = {
        id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]
    }
    model = trainer.model
    assert len(rates) == len(list(model.parameters()))
    for i, block in enumerate(model.backbone.network.blocks):
        for parameter in block.parameters():
            assert rates[id(parameter)] == pytest.approx(0.01 * 0.1 * 0.5 ** (5 - i))
            assert (decays[id(parameter)] == 0) == (parameter.dim() == 1)
    assert rates[id(model.backbone.network.patch_embed.proj.weight)] == pytest.approx(0.001 * 0.5**6)
    assert rates[id(model.head.weight)] == 0.01


@pytest.mark.parametrize("tune", ["head", "lora", "last-2"])
def test_the_estimates_count_what_is_trained(tune: str, large_images: Dataset, tmp_path: Path) -> None:
    import_or_skip("timm")
    if tune == "lora":
        import_or_skip("peft")
    config = VIT.replace(tune=tune)
    trial = footprint.try_network(config, large_images, 2)
    _, last = footprint.model_sizes("gist", config, large_images, trial)
    trainer = Trainer("gist", config, large_images)
    trainer.begin_stage(1)
    trainer.step()
    model = trainer.model
    assert last.state == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert last.trained == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    save_model(tmp_path / "m", model, large_images.class_names)
    assert abs((tmp_path / "m").stat().st_size - last.saved) < 0.05 * last.saved
    whole = footprint.try_network(VIT, large_images, 2)
    assert trial.activations < whole.activations or tune == "lora"
    if tune == "head":
        assert trial.activations == 4 * 3 * 160 * 160  # the image alone


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"tune": "last-9"},
            "--tune: expected last-N with N at most 3, the backbone's layers after the first",
        ),
        ({"tune": "lora"}, "--tune: expected a backbone with linear layers for lora"),
        ({"layer_decay": 0.5}, "--layer-decay: expected a backbone timm/NAME"),
        ({"tune": "lora", "methods": ("lfme",)}, "--methods: expected methods other than lfme"),
    ],
)
def test_what_does_not_fit_the_backbone_is_refused(
    options: dict[str, Any], words: str, images: Dataset
) -> None:
    problems = [str(problem) for problem in problems_of(IMAGES.replace(**options), images)]
    assert any(problem.startswith(words) for problem in problems), problems


def test_features_have_no_backbone_to_tune(features: Dataset) -> None:
    problems = list(map(str, problems_of(FEATURES.replace(tune="head"), features)))
    assert "--tune: expected all without a backbone, got 'head'" in problems


@pytest.mark.parametrize("tune", ["last", "last-0", "some", "last-x"])
def test_other_words_are_refused(tune: str) -> None:
    with pytest.raises(ConfigError, match=f"--tune: expected all, head, norm, last-N .*, got '{tune}'"):
        Config().replace(tune=tune)


def test_tuning_all_of_it_is_the_usual_training(images: Dataset) -> None:
    usual, all_of_it = (Trainer("gist", IMAGES.replace(**o), images) for o in ({}, {"tune": "all"}))
    finish(usual, 3)
    finish(all_of_it, 3)
    assert equal(usual.state_dict(), all_of_it.state_dict())
