"""A trained model as its users need it: images or features in, names and probabilities out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .data.labeled import ClassMatcher, listed
from .data.sources.image_files import decode, prepare
from .evaluated import Results, evaluate_trained
from .evaluation.priors import class_bias
from .surroundings import usual_settings
from .trained import TrainedModel, mean_probabilities

Sample = str | Path | Image.Image
BATCH_SIZE = 64


@dataclass(frozen=True)
class Predictions:
    """The k most probable classes of each of n samples, the most probable first.

    `classes` and `labels` hold n lists of k: names, and what the training data call the classes. `indices` [n, k] are
    positions in `Classifier.classes`, and `probabilities` [n, k] the softmax of the model's logits.
    """

    classes: list[list[str]]
    labels: list[list[str]]
    indices: Tensor
    probabilities: Tensor


class Classifier:
    """A trained model that prepares images as in training. `train.load` makes one from a model file.

    PyTorch's default dtype and device, autocast and the mode of gradients, which the program may have set, have no effect.
    """

    def __init__(self, trained: TrainedModel) -> None:
        self.trained = trained
        self.classes = trained.class_names
        self.labels = trained.class_labels or trained.class_names
        self.device = torch.device("cpu")

    def to(self, device: str | torch.device) -> Classifier:
        """Move the model to a device, and return this classifier."""
        self.device = torch.device(device)
        self.trained.to(self.device)
        return self

    @property
    def side(self) -> int:
        """The height and the width to which images are resized.

        Raises:
            ValueError: the model takes features, or images that are not square.
        """
        size = self.trained.image_size
        if len(size) != 2 or size[0] != size[1]:
            kind = f"tensors [n, c, {size[0]}, {size[1]}]" if size else "tensors of features [n, d]"
            raise ValueError(f"samples: expected {kind}, which the model takes, got images or their paths")
        return size[0]

    def pixels(self, images: Sequence[np.ndarray]) -> Tensor:
        """Return images [side, side, 3] uint8 as a batch for the model, [n, c, side, side] uint8."""
        gray = len(self.trained.model.normalize.mean) == 1  # type: ignore[arg-type]
        if gray:
            images = [np.asarray(Image.fromarray(image).convert("L"))[:, :, None] for image in images]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    @usual_settings()
    @torch.no_grad()
    def predict(
        self,
        samples: Tensor | Sample | Sequence[Sample],
        k: int = 5,
        batch_size: int = BATCH_SIZE,
        flips: bool = False,
    ) -> Predictions:
        """Return the k most probable classes of each sample, or all classes if there are fewer.

        Args:
            samples: paths or PIL images, prepared as in training; or a tensor of images [n, c, h, w] uint8 of the size of
                training or of features [n, d].
            k: the number of classes per sample.
            batch_size: the samples per pass through the network.
            flips: average the probabilities of each image and its mirror image, which takes two passes.

        Raises:
            TypeError: samples are neither paths, PIL images nor a tensor.
            ValueError: k or batch_size is below 1, there are no samples, they are not what the model takes, or features are to
                be flipped.
            UnreadableImage: a file cannot be decoded.
        """
        for name, value in (("k", k), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if isinstance(samples, (str, Path, Image.Image)) or not hasattr(samples, "__getitem__"):
            samples = [samples]  # type: ignore[list-item]  # is checked when it is decoded
        if isinstance(samples, Tensor):
            samples = self._checked(samples)
        if not len(samples):
            raise ValueError("samples: expected at least one sample, got none")
        self._check_flips(flips)
        k = min(k, len(self.classes))
        best = []
        for first in range(0, len(samples), batch_size):
            batch = samples[first : first + batch_size]
            x = batch if isinstance(batch, Tensor) else self.pixels([self._decode(image) for image in batch])
            best.append(self._probabilities(x.to(self.device), flips).topk(k))
        indices = torch.cat([found.indices for found in best]).cpu()
        probabilities = torch.cat([found.values for found in best]).cpu()
        rows = indices.tolist()
        return Predictions(
            classes=[[self.classes[i] for i in row] for row in rows],
            labels=[[self.labels[i] for i in row] for row in rows],
            indices=indices,
            probabilities=probabilities,
        )

    def _probabilities(self, x: Tensor, flips: bool) -> Tensor:
        views = (x, x.flip(3)) if flips else (x,)
        return mean_probabilities([self.trained.model(view) for view in views])

    @property
    def matcher(self) -> ClassMatcher:
        """Finds the model's classes by what other data call them."""
        return ClassMatcher(self.labels, self.classes)

    @usual_settings()
    def class_bias(self, prior: str, assumed: str | None = None) -> Tensor:
        """Return what adjusts the model's logits to another class prior, [K]; see `evaluation.priors.class_bias`.

        Args:
            prior: "uniform", "training", or the path of a CSV file with the columns class and count.
            assumed: the prior that the logits assume, "uniform" or "training"; None for the one of the method.

        Raises:
            ConfigError: the file cannot be used, or `assumed` is None and the method does not know the prior.
        """
        trained = self.trained
        return class_bias(prior, assumed, trained.prior_exponent, trained.train_counts, self.matcher)

    @usual_settings()
    def evaluate(
        self,
        samples: Tensor,
        classes: Tensor | Sequence[str],
        class_bias: Tensor | None = None,
        batch_size: int | None = None,
        progress: Callable[[int], object] = lambda done: None,
        *,
        flips: bool = False,
    ) -> Results:
        """Classify samples and compare with their classes, with the numbers that training reports for its test split.

        Args:
            samples: images [n, c, h, w] uint8 of the size of training, or features [n, d].
            classes: the class of each sample: positions in `classes`, [n] int64, or names or labels.
            class_bias: added to the logits, [K], as `Classifier.class_bias` returns it.
            batch_size: samples per pass; by default as many as in the evaluation after training.
            progress: called with the number of samples of each pass.
            flips: average the probabilities of each image and its mirror image, as `predict` does.

        Raises:
            TypeError: samples are not a tensor.
            ValueError: the samples are not what the model takes, a class is not one of the model's, or features are to be
                flipped.
        """
        samples = self._checked(samples)
        if not len(samples):
            raise ValueError("samples: expected at least one sample, got none")
        y = classes if isinstance(classes, Tensor) else self._numbers(classes)
        if y.shape != samples.shape[:1] or y.dtype != torch.int64:
            expected = f"a class of each of {len(samples)} samples, [n] int64"
            raise ValueError(f"classes: expected {expected}, got {list(y.shape)} {y.dtype}")
        if not 0 <= int(y.min()) <= int(y.max()) < len(self.classes):
            expected = f"positions in {len(self.classes)} classes"
            raise ValueError(f"classes: expected {expected}, got {int(y.min())} to {int(y.max())}")
        self._check_flips(flips)
        return evaluate_trained(self.trained, samples, y.cpu(), class_bias, batch_size, progress, flips=flips)

    def _numbers(self, classes: Sequence[str]) -> Tensor:
        """Return the positions of classes in the model, [n] int64, by names or labels."""
        matcher = self.matcher
        numbers = {text: matcher.find(text) for text in dict.fromkeys(classes)}
        if unknown := [text for text, number in numbers.items() if number is None]:
            raise ValueError(f"classes: expected the model's classes, got {listed(unknown)}")
        return torch.tensor([numbers[text] for text in classes])

    def _check_flips(self, flips: bool) -> None:
        if flips and not self.trained.image_size:
            raise ValueError("flips: expected False for a model of features, got True")

    def _checked(self, x: Tensor) -> Tensor:
        """Return samples in the dtype of training: images in uint8, features in float32."""
        if not isinstance(x, Tensor):
            raise TypeError(f"samples: expected a tensor, got {type(x).__name__}")
        shape = self.trained.sample_shape
        is_images = len(shape) > 1
        if list(x.shape[1:]) != shape or (x.dtype != torch.uint8 if is_images else not x.is_floating_point()):
            sizes = ", ".join(map(str, ("n", *shape)))
            expected = f"images [{sizes}] uint8" if is_images else f"floating-point features [{sizes}]"
            raise ValueError(f"samples: expected {expected}, got {list(x.shape)} {x.dtype}")
        return x if is_images else x.float()

    def _decode(self, image: Sample) -> np.ndarray:
        if isinstance(image, Image.Image):
            return prepare(image.copy(), self.side)
        if not isinstance(image, str | os.PathLike):
            expected = "paths or PIL images (Image.fromarray makes them of RGB arrays), or one tensor"
            raise TypeError(f"samples: expected {expected}, got {type(image).__name__}")
        return decode(Path(image), self.side)
