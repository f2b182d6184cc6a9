"""Trained models with everything that a row of the results table needs: both heads, the prior and the groups of classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import Config, DataConfig
from .data.dataset import Dataset
from .methods import METHODS
from .methods.method import Method
from .model.model import Model, ModelFileError, head_of, network_of, read_model_file
from .shot_groups import split_classes

HEAD_WEIGHTS = ("head.centers", "head.centroids", "head.weight")  # [K, d], whichever a head has


@dataclass(frozen=True)
class TrainedModel:
    """A trained model and the description in its file.

    `model` has the heads of training and is in evaluation mode. `class_labels` holds what the data call each class: the label,
    name or id in position k is class k. It is empty in files that do not say so. `train_counts` holds the training samples of each class, [K],
    `shot_groups` the group of each class by `split_rule`: many, medium or few. `image_size` is the height and the width of
    the images before the crop; it is empty if the model takes features. `prior_exponent` is that of `Method`, with the options of training.
    `sample_shape` is that of a sample: [c, h, w] uint8 or [d]. `held_out` is the name of the data, --hold-out and --hold-out-seed of
    training; None if nothing was held out.
    """

    model: Model
    method_name: str
    method: Method
    class_names: list[str]
    class_labels: list[str]
    train_counts: Tensor
    shot_groups: list[str]
    split_rule: str
    image_size: list[int]
    prior_exponent: float | None
    sample_shape: list[int]
    held_out: tuple[str, float, int] | None

    def to(self, device: torch.device) -> None:
        """Move the model, and the tensors with which its method scores, to a device."""
        self.model.to(device)
        self.method.to(device)

    @torch.no_grad()
    def scores(self, x: Tensor) -> dict[str, Tensor]:
        """Return the scores [b, K] of each row of the results table, by the row's name; "" names the head's own logits.

        Args:
            x: images [b, c, h, w] uint8 or features [b, d].
        """
        features = self.model.features(x)
        logits = self.model.head(features)
        return {"": logits} | self.method.alternative_scores(self.model.head, features, logits)


def mean_probabilities(logits: list[Tensor]) -> Tensor:
    """Return the mean of the probabilities that the logits [b, K] of several views of the same samples give, [b, K]."""
    return torch.stack([view.float().softmax(1) for view in logits]).mean(0)


def describe(method: str, config: Config, data: Dataset) -> dict[str, Any]:
    """Return the description of a trained model for `save_model`, in plain types."""
    groups = split_classes(data.train_counts, config.run.split_rule)
    return {
        "method": method,
        "class_labels": list(data.class_labels),
        "train_counts": data.train_counts.tolist(),
        "split_rule": config.run.split_rule,
        "shot_groups": [
            next(name for name, mask in groups.items() if mask[k]) for k in range(data.num_classes)
        ],
        "prior_strength": config.method.prior_strength,
        "prior_exponent": METHODS[method](config, data.train_counts).prior_exponent,
        "image_size": data.sample_shape[1:],
        "held_out": held_out(config.data),
    }


def held_out(config: DataConfig) -> list[Any] | None:
    """Return the name of the data, and the share and the seed of the samples that are held out; None if there are none."""
    if not config.hold_out:
        return None
    return [Path(config.data).resolve().name, config.hold_out, config.hold_out_seed]


def load_trained(path: str | Path) -> TrainedModel:
    """Load a trained model from `runs/<name>/model-<method>.safetensors` with all its heads.

    `load_model` loads the head for inference alone, also from files of earlier versions.

    Raises:
        ModelFileError: the file is truncated or damaged, is not from a run, or is of an earlier version, which has neither the
            method nor the random stream's head.
    """
    description, state = read_model_file(path)
    if "method" not in description:
        raise ModelFileError(f"{path} of an earlier version, which does not name its method; train again")
    counts = torch.tensor(description["train_counts"])
    num_displacements = len(state.get("head.displacements", ()))
    config = Config().replace(
        prior_strength=description["prior_strength"], num_displacements=num_displacements
    )
    method = METHODS[description["method"]](config, counts)
    if "head.centers" in state:
        head = method.make_head(state["head.centers"].shape[1], len(counts))  # with the random stream's head
        if num_displacements:
            head.add_displacements(num_displacements)  # type: ignore[operator]
    else:
        head = head_of(description, state)
    model = Model(*network_of(description, state), head, description["backbone"])
    model.load_state_dict(state)
    names = ("shot_groups", "split_rule", "image_size")
    num_features = next(state[name].shape[1] for name in HEAD_WEIGHTS if name in state)
    size = description["image_size"]
    return TrainedModel(
        model=model.eval(),
        method_name=description["method"],
        method=method,
        class_names=description["classes"],
        class_labels=description.get("class_labels", []),
        train_counts=counts,
        prior_exponent=_prior_exponent(description, method),
        sample_shape=[len(state["normalize.mean"]), *size] if size else [num_features],
        held_out=tuple(description["held_out"]) if description.get("held_out") else None,
        **{name: description[name] for name in names},
    )


def _prior_exponent(description: dict[str, Any], method: Method) -> float | None:
    """Return the exponent that training has written or, of a file of an earlier version, the one that all its options imply."""
    implied = method.prior_exponent if description["prior_strength"] == 1 else None
    exponent: float | None = description.get("prior_exponent", implied)
    return exponent
