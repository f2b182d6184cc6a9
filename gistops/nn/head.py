"""What all max-cosine heads have in common: temperature, loss, prediction."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from .._checks import FLOAT_DTYPES, check_classifier, check_integer, check_positive
from .._classifier import Classifier
from ..functional.logits import center_norms, frozen_logits
from ..functional.topk import topk


class Prediction(NamedTuple):
    """The best classes of each sample, the best first, [B, k] each."""

    probabilities: Tensor  # over all classes, in the dtype of the logits
    classes: Tensor  # int64
    slots: Tensor  # uint8, which of the class's vectors won


class MaxCosineHead(nn.Module):
    """A classifier by the best cosine over the vectors of each class. For subclasses.

    Parameters of the module:
        centers: [num_classes, ...]; its subclass says what else there is.
        raw_tau: [1], τ = softplus(raw_tau), so that τ is positive whatever the optimiser does.
    """

    centers: nn.Parameter
    raw_tau: nn.Parameter
    _norms: Tensor | None  # of a frozen head on the CPU
    _versions: tuple[int, ...] = ()  # of the parameters that they were made from
    frozen = False

    def __init__(self, in_features: int, num_classes: int, tau: float, backend: str | None) -> None:
        super().__init__()
        self.in_features = check_integer("in_features", in_features, 1)
        self.num_classes = check_integer("num_classes", num_classes, 1)
        self.initial_tau = check_positive("tau", tau)
        if backend is not None and backend not in backends.NAMES:
            names = ", ".join(map(repr, backends.NAMES))
            raise ValueError(f"backend: expected None or one of {names}, got {backend!r}")
        self.backend = backend
        self.register_buffer("_norms", None, persistent=False)

    def _make_parameters(
        self, shapes: dict[str, tuple[int, ...]], device: Any, dtype: torch.dtype | None
    ) -> None:
        if dtype is not None and dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype: expected float32, float16, bfloat16 or float64, got {dtype}")
        for name, shape in shapes.items():
            value = torch.empty(shape, device=device, dtype=dtype)
            # No gradient for no displacements: FSDP does not take an empty one.
            setattr(self, name, nn.Parameter(value, requires_grad=value.numel() > 0))

    @property
    def tau(self) -> Tensor:
        """The temperature τ = softplus(raw_tau), a scalar, float32 (float64 in a float64 module)."""
        return positive(self.raw_tau)

    def loss(self, input: Tensor, target: Tensor, **options: Any) -> Tensor:
        """Cross-entropy of the logits, which are never held.

        Under DDP call it in the `forward` of the module that is wrapped, because DDP sees to gradients of calls to
        `forward` only.

        Args:
            input: features, [B, in_features].
            target: classes, [B], int64 or int32.
            options: class_bias, weight, margin, margin_kind, reduction, ignore_index, label_smoothing and return_lse,
                as in `gistops.constellation_cross_entropy`.

        Returns, raises: as that.
        """
        raise NotImplementedError

    def _displacements(self) -> Tensor:
        raise NotImplementedError

    def _classifier(self) -> Classifier:
        """Return the arguments of the logits besides input, unchecked."""
        raise NotImplementedError

    def _topk(self, input: Tensor, k: int, class_bias: Tensor | None, return_lse: bool) -> tuple[Tensor, ...]:
        classifier, norms = check_classifier(input, self._classifier()), self._known_norms(input)
        return topk(input, classifier, k, class_bias, return_lse, self.backend, norms)

    def freeze(self) -> MaxCosineHead:
        """Make the head ready for inference: eval mode, no gradients, and norms made once. Returns itself.

        Results stay the same, bit for bit. On GPUs, where the norms are made in the pass that makes the products, they
        are not kept; nor for rotations and networks. `unfreeze()` ends it; parameters that are changed or moved meanwhile are noticed.
        """
        self.frozen = True
        self.eval().requires_grad_(False)
        self._make_norms()
        return self

    def unfreeze(self) -> MaxCosineHead:
        """Undo `freeze()`: all parameters that are not empty take gradients again. Returns itself, in eval mode."""
        self.frozen = False
        self._norms = None
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.numel() > 0)
        return self

    def _make_norms(self) -> None:
        self._norms = None
        cpu = not self.centers.is_meta and backends.choose(self.centers.device.type, self.backend) == "cpu"
        classifier = self._classifier()
        if cpu and classifier.transform in ("translation", "subcenters"):
            self._norms = center_norms(classifier)
        self._versions = self.centers._version, self._displacements()._version

    def _known_norms(self, input: Tensor) -> Tensor | None:
        """The norms of a frozen head; None where there are none, or a gradient is wanted."""
        if not self.frozen or (torch.is_grad_enabled() and input.requires_grad):
            return None
        if not torch.compiler.is_compiling():
            now = self.centers._version, self._displacements()._version
            if now != self._versions:
                self._make_norms()
        return self._norms

    def _frozen_logits(self, input: Tensor) -> tuple[Tensor, Tensor] | None:
        """logits and slots by the norms of a frozen head, if it has them."""
        norms = self._known_norms(input)
        if norms is None:
            return None
        return frozen_logits(input, check_classifier(input, self._classifier()), norms)

    def _apply(self, *args: Any, **kwargs: Any) -> MaxCosineHead:
        self._norms = None  # of another device or dtype
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        if self.frozen:
            self._make_norms()
        return self

    @torch.no_grad()
    def predict(self, input: Tensor, *, class_bias: Tensor | None = None) -> Tensor:
        """The class with the largest logit, [B], int64, without logits [B, K]; of equals the lowest.

        Args:
            input: features, [B, in_features].
            class_bias: added to the logits, [num_classes]; minus a log prior adjusts a model after training.

        Raises:
            TypeError, ValueError, gistops.BackendUnavailable: as `gistops.constellation_topk`.
        """
        return self._topk(input, 1, class_bias, return_lse=False)[1][:, 0]

    @torch.no_grad()
    def predict_topk(self, input: Tensor, k: int, *, class_bias: Tensor | None = None) -> Prediction:
        """The k most probable classes, with their probabilities over all classes, without logits [B, K].

        Args and raises: as `predict`; k, 1 to num_classes.
        """
        values, classes, slots, lse = self._topk(input, k, class_bias, return_lse=True)
        return Prediction((values - lse[:, None]).exp(), classes, slots)


def positive(raw: Tensor) -> Tensor:
    """softplus of a parameter [1] as a scalar, float32 (float64 for float64): bfloat16 is too coarse."""
    return F.softplus(raw.to(compute_dtype(raw))).reshape(())


def inverse_softplus(value: float) -> float:
    """The number whose softplus is `value`, above 0."""
    return value + math.log(-math.expm1(-value))


def compute_dtype(value: Tensor) -> torch.dtype:
    """The dtype of what is made of a parameter: float64 for float64, otherwise float32."""
    return torch.promote_types(value.dtype, torch.float32)
