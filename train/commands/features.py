"""`python -m train features`: writes the features of a dataset from a trained network, in a file for `--data`.

A head trains on features in seconds (`--recipe features`), because images pass through the network only once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from ..config import BackboneConfig, ConfigError, CropConfig, DataConfig, DeviceConfig, RecipeConfig
from ..console import messages_of, print_json, say
from ..data.dataset import Dataset
from ..data.errors import DataError
from ..data.load import load
from ..files import write_atomically
from ..model.backbones import BackboneError, Timm, make_backbone
from ..model.model import Model, Normalize, load_model
from ..options import InvalidData, Sections
from .model_file import expect_images, open_model

BATCH_SIZE = 500  # as in evaluation, so that the features are bitwise those of the evaluation


@dataclass(frozen=True, kw_only=True)
class Features(Sections):
    """Computes the features of all samples of a dataset with a trained network."""

    run: RecipeConfig = field(default_factory=RecipeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: BackboneConfig = field(default_factory=BackboneConfig)
    augment: CropConfig = field(default_factory=CropConfig)
    runtime: DeviceConfig = field(default_factory=DeviceConfig)
    #: A trained model, runs/<name>/model-<method>.safetensors. Its own network, normalization, crop and centering
    #: are used, and --backbone and --crop-size have no effect. If not given, use the weights of timm:
    #: set --backbone timm/NAME and --pretrained or --pretrained-file.
    weights: str = ""
    #: The .safetensors file to write, with x_train, y_train, x_test, y_test and the names of the classes.
    out: str = "features.safetensors"
    #: Write one JSON object to standard output: the file, its arrays' shapes and the names of the classes; messages go to standard error.
    json: bool = False


def extract(features: Features, console: Console) -> int:
    """Write the features of all samples, computed in evaluation mode without augmentation.

    Raises:
        ConfigError: the data are not images, there is no trained network for them, or the file cannot be written.
    """
    messages = messages_of(console, as_json=features.json)
    out = Path(features.out)
    if out.suffix != ".safetensors":
        raise ConfigError("out", "a file named .safetensors", repr(features.out))
    if out.exists():
        raise ConfigError("out", "a new file", f"{out}, which exists")
    if not out.parent.is_dir():
        raise ConfigError("out", "a file in an existing folder", repr(features.out))
    if features.runtime.threads:
        torch.set_num_threads(features.runtime.threads)
    try:
        data = load(features.data)
    except DataError as error:
        raise InvalidData(error) from None
    if not data.is_images:
        got = f"features {data.sample_shape} in {features.data.data}, which --recipe features trains on directly"
        raise ConfigError("data", "images", got)
    model = load_network(features, data).to(features.runtime.resolved_device).eval()
    parts = {"train": (data.x_train, data.y_train), "test": (data.x_test, data.y_test)}
    if data.x_val is not None and data.y_val is not None:
        parts["val"] = (data.x_val, data.y_val)
    arrays: dict[str, Tensor] = {}
    for part, (x, y) in parts.items():
        arrays[f"x_{part}"] = compute_features(model, x, part, messages)
        arrays[f"y_{part}"] = y
    metadata = {"classes": json.dumps(data.class_names)}
    write_atomically(out, lambda path: safetensors.torch.save_file(arrays, path, metadata))
    if features.json:
        shapes = {name: list(array.shape) for name, array in arrays.items()}
        print_json({"file": str(out), "arrays": shapes, "classes": data.class_names})
    say(messages, f"written to {out}")
    return 0


def load_network(features: Features, data: Dataset) -> Model:
    """Return the network that computes the features, with the weights of an earlier run or of timm.

    Raises:
        ConfigError: no weights are given, or the network is for other images.
    """
    channels, side = data.sample_shape[0], min(data.sample_shape[1:])
    if features.weights and features.model.weights:
        option = "pretrained_file" if features.model.pretrained_file else "pretrained"
        raise ConfigError(option, f"either --weights or --{option.replace('_', '-')}", "both")
    if features.weights:
        model, _ = open_model("weights", features.weights, load_model)
        expect_images("weights", features.weights, model)
        assert isinstance(model.normalize, Normalize)
        if len(model.normalize.mean) != channels:
            expected = f"a network for images with {channels} channels, as in {features.data.data}"
            raise ConfigError("weights", expected, f"{len(model.normalize.mean)} in {features.weights}")
        option, crop_size = "weights", model.normalize.crop_size
    elif features.model.weights:
        try:
            backbone = make_backbone(features.model.backbone, channels, features.model.weights)
        except BackboneError as error:
            raise ConfigError("backbone", str(error), repr(features.model.backbone)) from None
        assert isinstance(backbone, Timm)  # cli.check refuses other backbones
        option, crop_size = "crop_size", features.augment.crop_size or 0
        # The network is used as it is, so images are normalized as in its training, not with the statistics of the data.
        normalize = Normalize(*backbone.mean_std(channels), crop_size)
        model = Model(normalize, backbone, nn.Identity(), nn.Identity(), features.model.backbone)
    else:
        expected = "--weights PATH, a run's model, or --backbone timm/NAME --pretrained"
        raise ConfigError("weights", expected, f"neither, so {features.model.backbone} would be untrained")
    if crop_size > side:
        raise ConfigError(option, f"a crop of at most the images' side, {side}", crop_size)
    return model


@torch.no_grad()
def compute_features(model: Model, x: Tensor, part: str, console: Console) -> Tensor:
    """Return the features of all images `x` [n, c, h, w], as [n, d] float32 on the CPU."""
    device = next(model.parameters()).device
    result: Tensor | None = None
    batches = list(range(0, len(x), BATCH_SIZE))
    bar = Console(stderr=True, quiet=console.quiet)
    for first in track(batches, f"{part} features", console=bar, disable=not bar.is_terminal):
        rows = slice(first, first + BATCH_SIZE)
        features = model.features(x[rows].to(device))
        if result is None:  # allocated once: concatenating a list of batches would take twice the memory
            result = torch.empty(len(x), features.shape[1])
        result[rows] = features
    assert result is not None  # no dataset is empty
    say(console, f"{part}: {len(result):,} features [{result.shape[1]}]")
    return result
