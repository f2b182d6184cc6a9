"""The base class of the heads: temperature, loss, prediction, frozen norms."""

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
from ..operators.registry import compute_dtype


class Prediction(NamedTuple):
    """The top classes per sample, in descending order; all tensors [B, k]."""

    probabilities: Tensor  # over all classes, in the dtype of the logits
    classes: Tensor  # int64
    slots: Tensor  # uint8, the winning slot of the class


class MaxCosineHead(nn.Module):
    """The base class of classifiers whose logits are the highest cosine over the vectors of each class.

    Parameters of the module:
        centers: [num_classes, ...]; the subclasses add more parameters.
        raw_tau: [1]; τ = softplus(raw_tau), so that τ stays positive.
    """

    centers: nn.Parameter
    raw_tau: nn.Parameter
    _norms: Tensor | None  # the norms of a frozen head on the CPU
    _versions: tuple[int, ...] = ()  # versions of the parameters from which _norms was computed
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
            # An empty parameter requires no grad: FSDP does not accept its gradient.
            setattr(self, name, nn.Parameter(value, requires_grad=value.numel() > 0))

    @property
    def tau(self) -> Tensor:
        """The temperature τ = softplus(raw_tau), a scalar, float32 (float64 in a float64 module)."""
        return positive(self.raw_tau)

    def loss(self, input: Tensor, target: Tensor, **options: Any) -> Tensor:
        """Compute the cross-entropy without materializing the logits.

        Under DDP call this method in the `forward` of the wrapped module, because DDP synchronizes the gradients of
        calls to `forward` alone.

        Args:
            input: features, [B, in_features].
            target: classes, [B], int64 or int32.
            options: class_bias, weight, margin, margin_kind, reduction, ignore_index, label_smoothing and return_lse,
                as in `gistops.constellation_cross_entropy`.

        Returns, raises: as for `gistops.constellation_cross_entropy`.
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
        """Prepare the head for inference: eval mode, no gradients, norms computed once. Returns the head.

        The results keep their bits. Norms are kept on the CPU alone (on GPUs the matmul's pass computes them), and not
        for rotations and MLPs. The norms are recomputed when parameters change or move. `unfreeze()` undoes it.
        """
        self.frozen = True
        self.eval().requires_grad_(False)
        self._make_norms()
        return self

    def unfreeze(self) -> MaxCosineHead:
        """Undo `freeze()`: all nonempty parameters require grad again. Returns the head, still in eval mode."""
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
        """Return the norms of a frozen head. None if there are none, or if a gradient is needed."""
        if not self.frozen or (torch.is_grad_enabled() and input.requires_grad):
            return None
        if not torch.compiler.is_compiling():
            now = self.centers._version, self._displacements()._version
            if now != self._versions:
                self._make_norms()
        return self._norms

    def _frozen_logits(self, input: Tensor) -> tuple[Tensor, Tensor] | None:
        """Compute logits and slots from the norms of a frozen head. None if it has none."""
        norms = self._known_norms(input)
        if norms is None:
            return None
        return frozen_logits(input, check_classifier(input, self._classifier()), norms)

    def _apply(self, *args: Any, **kwargs: Any) -> MaxCosineHead:
        self._norms = None  # their device or dtype may change
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        if self.frozen:
            self._make_norms()
        return self

    @torch.no_grad()
    def predict(self, input: Tensor, *, class_bias: Tensor | None = None) -> Tensor:
        """Return the class with the largest logit, [B], int64. Ties are broken by the lower class index.

        The logits [B, K] are not materialized.

        Args:
            input: features, [B, in_features].
            class_bias: added to the logits, [num_classes]. The negative log prior adjusts a trained model.

        Raises:
            TypeError, ValueError, gistops.BackendUnavailable: as for `gistops.constellation_topk`.
        """
        return self._topk(input, 1, class_bias, return_lse=False)[1][:, 0]

    @torch.no_grad()
    def predict_topk(self, input: Tensor, k: int, *, class_bias: Tensor | None = None) -> Prediction:
        """Return the k most probable classes. The probabilities are normalized over all classes.

        The logits [B, K] are not materialized.

        Args:
            input, class_bias: as in `predict`.
            k: number of classes, 1 to num_classes.

        Raises:
            TypeError, ValueError, gistops.BackendUnavailable: as for `gistops.constellation_topk`.
        """
        values, classes, slots, lse = self._topk(input, k, class_bias, return_lse=True)
        return Prediction((values - lse[:, None]).exp(), classes, slots)


def positive(raw: Tensor) -> Tensor:
    """Return softplus of a parameter [1] as a scalar, in float32 (float64 for float64): bfloat16 is too coarse."""
    return F.softplus(raw.to(compute_dtype(raw))).reshape(())


def inverse_softplus(value: float) -> float:
    """Return the number whose softplus is `value`, which is above 0."""
    return value + math.log(-math.expm1(-value))
