"""The model: input normalization, a backbone and a head; and the file format of trained models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from gistops.nn import ConstellationClassifier, GistClassifier

from ..data.dataset import Dataset
from .backbones import Timm, make_backbone
from .feature_transfer import FeatureTransfer
from .memory_head import MemoryHead
from .prior import log_prior
from .tuning import add_low_rank_updates, freeze_untuned, keep_frozen_statistics, merge_low_rank_updates

RANDOM_HEAD = ("head.random_", "head.raw_random_")  # tensors of the random stream's head
TRAINING_ONLY = ("feature_transfer.", "auxiliary.")

HeadMaker = Callable[[int, int], nn.Module]  # (in_features, num_classes) -> head


class Normalize(nn.Module):
    """Scale images [b, c, h, w] from 0 to 255 to mean 0 and standard deviation 1 over the training images.

    Images larger than `crop_size` are center-cropped to it; 0 disables the crop.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, crop_size: int = 0) -> None:
        super().__init__()
        self.crop_size = crop_size
        self.register_buffer("mean", mean[:, None, None])
        self.register_buffer("std", std[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        if self.crop_size:
            top, left = ((side - self.crop_size) // 2 for side in images.shape[2:])
            images = images[:, :, max(top, 0) :, max(left, 0) :][:, :, : self.crop_size, : self.crop_size]
        x = (images.float() / 255 - self.mean) / self.std
        return x.contiguous(memory_format=torch.channels_last)


class Model(nn.Module):
    """A classifier of images [b, c, h, w] uint8 or, without a backbone, of features [b, d]; returns logits [b, K]."""

    feature_transfer: FeatureTransfer | None  # in training only; set by methods that use it
    #: Other modules that only training uses, such as teachers. Kept in evaluation mode, and left out of model files.
    auxiliary: nn.Module | None
    frozen_features = False
    tune = "all"  # the part of the backbone that is trained where features are not frozen; see tuning.py

    def __init__(
        self,
        normalize: nn.Module,
        backbone: nn.Module,
        center: nn.Module,
        head: nn.Module,
        backbone_name: str,
    ) -> None:
        super().__init__()
        self.normalize, self.backbone, self.center, self.head = normalize, backbone, center, head
        self.backbone_name = backbone_name
        self.register_module("feature_transfer", None)
        self.register_module("auxiliary", None)
        for parameter in self.parameters():
            if parameter.dim() == 4:  # the faster memory layout for convolutions
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def freeze_features(self, frozen: bool) -> None:
        """Keep the weights and the statistics of everything before the head from now on, or train them again."""
        self.frozen_features = frozen
        for module in (self.normalize, self.backbone, self.center):
            module.requires_grad_(not frozen)
        if not frozen:
            freeze_untuned(self.backbone, self.tune)
        self.train(self.training)

    def train(self, mode: bool = True) -> Model:
        super().train(mode)
        if self.frozen_features:
            for module in (self.normalize, self.backbone, self.center):
                module.eval()
        elif self.tune != "all":
            keep_frozen_statistics(self.backbone)
        if self.auxiliary is not None:
            self.auxiliary.eval()
        return self

    def features(self, x: Tensor) -> Tensor:
        """Return the head's input, [b, d]."""
        features: Tensor = self.center(self.backbone(self.normalize(x)))
        return features

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


def build_model(
    data: Dataset,
    make_head: HeadMaker,
    *,
    backbone_name: str,
    pretrained: bool | str = False,
    center_features: bool = False,
    crop_size: int | None = None,
    tune: str = "all",
    lora_rank: int = 8,
) -> Model:
    """Return a new model for the samples and classes of a dataset.

    Args:
        data: the dataset.
        make_head: returns the head, given in_features and num_classes.
        backbone_name: the backbone; not used if the samples are features.
        pretrained: start from the pretrained weights of timm, or from those in this file.
        center_features: put a batch normalization without parameters before the head.
        crop_size: the size of the center crop; no crop if None.
        tune: the part of the backbone that is trained, as in --tune.
        lora_rank: the rank of the updates for "lora".

    Raises:
        BackboneError: the backbone is unavailable.
        ConfigError: the backbone does not have what `tune` names.
    """
    normalize: nn.Module = nn.Identity()
    backbone: nn.Module = nn.Identity()
    in_features = data.sample_shape[0]
    if data.is_images:
        backbone = make_backbone(backbone_name, in_features, pretrained)
        statistics = (
            backbone.mean_std(in_features) if isinstance(backbone, Timm) and pretrained else data.mean_std()
        )
        normalize = Normalize(*statistics, crop_size or 0)
        in_features = int(backbone.out_features)  # type: ignore[arg-type]
        if tune == "lora":
            add_low_rank_updates(backbone, lora_rank)
    center = nn.BatchNorm1d(in_features, affine=False) if center_features else nn.Identity()
    model = Model(normalize, backbone, center, make_head(in_features, data.num_classes), backbone_name)
    model.tune = tune
    return model


def save_model(
    path: Path,
    model: Model,
    class_names: list[str],
    details: dict[str, Any] | None = None,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write a trained model: weights as safetensors, with metadata for `load_model`.

    The random stream's centers are kept, because rows of the results table use them. Modules that only training uses are
    left out, and low-rank updates are merged into the weights, so that the file needs no peft.

    Args:
        path: the file.
        model: the model.
        class_names: the names of the classes.
        details: more values for the metadata, in plain types, such as those that `trained.describe` returns.
        state: the state dict of a model whose head is sharded, as `sharded_head.whole_state` returns it.
    """
    head = model.head
    state = model.state_dict() if state is None else state
    if model.tune == "lora":
        state = merge_low_rank_updates(model, state)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(TRAINING_ONLY)}
    # A single metadata entry: safetensors does not keep the order of several, and equal models must give equal bytes.
    crop_size = model.normalize.crop_size if isinstance(model.normalize, Normalize) else 0
    description = {"backbone": model.backbone_name, "classes": class_names, "crop_size": crop_size}
    if isinstance(head, ConstellationClassifier):
        description |= {"transform": head.transform, "hidden_features": head.hidden_features}
    metadata = {"train": json.dumps(description | (details or {}))}
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}  # required by safetensors
    path.write_bytes(safetensors.torch.save(contiguous, metadata))


class ModelFileError(ValueError):
    """A file that is no whole model file. The message names the file and the reason."""

    expected = "a trained model, runs/<name>/model-<method>.safetensors"

    def __init__(self, got: str) -> None:
        super().__init__(f"path: expected {self.expected}, got {got}")
        self.got = got


def read_model_file(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the description and the tensors of a model file.

    Raises:
        ModelFileError: the file is truncated or damaged, or is not from a run.
        OSError: the file does not exist or cannot be read.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ModelFileError(
            f"{path}, which is damaged or another file ({error}); copy the file again, or train again"
        ) from None
    if "train" not in metadata:
        raise ModelFileError(f"{path}, which no run has written")
    try:
        description = json.loads(metadata["train"])
    except ValueError as error:
        raise ModelFileError(f"{path}, whose description is damaged ({error})") from None
    if not isinstance(description, dict):
        raise ModelFileError(f"{path}, whose description is a {type(description).__name__}")
    if "exported" in description:
        raise ModelFileError(f"{path}, which is an export; use the model file that it was made from")
    return description, state


def network_of(
    description: dict[str, Any], state: dict[str, Tensor]
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return the normalization, the backbone and the centering of a model file, without their weights."""
    normalize: nn.Module = nn.Identity()
    backbone: nn.Module = nn.Identity()
    center: nn.Module = nn.Identity()
    if "normalize.mean" in state:
        mean, std = state["normalize.mean"].flatten(), state["normalize.std"].flatten()
        normalize = Normalize(mean, std, description["crop_size"])
        backbone = make_backbone(description["backbone"], len(mean))
    if "center.running_mean" in state:
        center = nn.BatchNorm1d(len(state["center.running_mean"]), affine=False)
    return normalize, backbone, center


def head_of(
    description: dict[str, Any],
    state: dict[str, Tensor],
    constellation: type[ConstellationClassifier] = ConstellationClassifier,
) -> nn.Module:
    """Return the head of a model file for inference, without its weights; `constellation` is the class of constellations."""
    num_classes = len(description["classes"])
    if "head.centroids" in state:
        return MemoryHead(state["head.centroids"].shape[1], num_classes)
    if "head.centers" not in state:
        return nn.Linear(state["head.weight"].shape[1], num_classes)
    num_displacements, in_features = state["head.displacements"].shape
    hidden = description["hidden_features"] if description["transform"] == "mlp" else None
    return constellation(
        in_features,
        num_classes,
        num_displacements,
        transform=description["transform"],
        hidden_features=hidden,
    )


def load_model(path: str | Path, heads: Literal["balanced", "both"] = "balanced") -> tuple[Model, list[str]]:
    """Load a trained model from `runs/<name>/model-<method>.safetensors`, with the head for inference.

    Args:
        path: the file.
        heads: "balanced" for the head that the method keeps for inference. "both" for GistNet's two heads together: a
            `gistops.nn.TwoHeadClassifier`, with the scores of the results table's row "both heads" up to a number per sample.

    Returns:
        The model in evaluation mode, and the names of its classes.

    Raises:
        ValueError: `heads` has another value, or it is "both" and the file has one head or is of an earlier version.
        ModelFileError: the file is truncated or damaged, or is not from a run.
    """
    description, state = read_model_file(path)
    if heads not in ("balanced", "both"):
        raise ValueError(f"heads: expected 'balanced' or 'both', got {heads!r}")
    if heads == "both":
        if "head.random_centers" not in state or "train_counts" not in description:
            raise ValueError(
                f"heads: expected 'balanced' for {path}, which has one head or is of an earlier version, got 'both'"
            )
        head = head_of(description, state, GistClassifier)
    else:
        head = head_of(description, state)
        state = {name: x for name, x in state.items() if not name.startswith(RANDOM_HEAD)}
    model = Model(*network_of(description, state), head, description["backbone"])
    model.load_state_dict(state)
    if isinstance(model.head, GistClassifier):
        prior = description["prior_strength"] * log_prior(torch.tensor(description["train_counts"]))
        model.head = model.head.export(heads="both", class_bias=-prior)
    return model.eval(), description["classes"]
