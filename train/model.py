"""A network: what scales its input, a backbone, a head. And the file of a trained one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from gistops.nn import ConstellationClassifier, GistClassifier

from .backbones import BACKBONES
from .data.arrays import Dataset


class Normalize(nn.Module):
    """Images uint8 [b, c, h, w] to floats with mean 0 and standard deviation 1 over the training images."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean[:, None, None])
        self.register_buffer("std", std[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        x = (images.float() / 255 - self.mean) / self.std
        return x.contiguous(memory_format=torch.channels_last)


class Model(nn.Module):
    """Classifies images [b, c, h, w] uint8 (or, without a backbone, features [b, d]) into logits [b, K]."""

    def __init__(self, normalize: nn.Module, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.normalize, self.backbone, self.head = normalize, backbone, head
        for parameter in self.parameters():
            if parameter.dim() == 4:  # the faster layout for convolutions
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def features(self, x: Tensor) -> Tensor:
        features: Tensor = self.backbone(self.normalize(x))
        return features

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


def build_trunk(backbone: str, data: Dataset) -> tuple[nn.Module, nn.Module, int]:
    """All before the head: input scaling, backbone, and the features that come out."""
    if not data.is_images:
        return nn.Identity(), nn.Identity(), data.sample_shape[0]
    network = BACKBONES[backbone](data.sample_shape[0])
    return Normalize(*data.mean_std()), network, network.out_features


def save_model(path: Path, model: Model, backbone: str, class_names: list[str]) -> None:
    """Write a trained model for inference: weights as safetensors, and in its metadata what `load_model` needs."""
    head = model.head.export() if isinstance(model.head, GistClassifier) else model.head
    state = {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    state |= {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    metadata = {"backbone": backbone, "classes": json.dumps(class_names)}
    path.write_bytes(safetensors.torch.save({k: v.contiguous() for k, v in state.items()}, metadata))


def load_model(path: str | Path) -> tuple[Model, list[str]]:
    """A trained model in evaluation mode, and its classes' names, from `runs/<name>/model-<method>.safetensors`."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = file.metadata()
        state: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    names = json.loads(metadata["classes"])
    normalize: nn.Module = nn.Identity()
    backbone: nn.Module = nn.Identity()
    if "normalize.mean" in state:
        normalize = Normalize(state["normalize.mean"].flatten(), state["normalize.std"].flatten())
        backbone = BACKBONES[metadata["backbone"]](len(state["normalize.mean"]))
    head: nn.Module
    if "head.centers" in state:
        num_displacements, in_features = state["head.displacements"].shape
        head = ConstellationClassifier(in_features, len(names), num_displacements)
    else:
        head = nn.Linear(state["head.weight"].shape[1], len(names))
    model = Model(normalize, backbone, head)
    model.load_state_dict(state)
    return model.eval(), names
