"""The base class of the heads: temperature, loss, frozen copies, more classes."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from .._checks import FLOAT_DTYPES
from .._numbers import check_integer, check_positive
from .changes import check_all_plain, check_generator, check_plain, check_whole
from .frozen import FrozenClassifier
from .prediction import Predictor
from .temperature import check_representable, inverse_softplus, positive


class MaxCosineHead(Predictor):
    """The base class of classifiers whose logits are the highest cosine over the vectors of each class.

    Parameters of the module:
        centers: [num_classes, ...]; the subclasses add more parameters.
        raw_tau: [1]; τ = softplus(raw_tau), so that τ stays positive.
    """

    centers: nn.Parameter
    raw_tau: nn.Parameter
    frozen = False
    #: The parameters with a row per class.
    _per_class: tuple[str, ...] = ("centers",)

    def __init__(self, in_features: int, num_classes: int, tau: float, backend: str | None) -> None:
        super().__init__()
        self.in_features = check_integer("in_features", in_features, 1)
        self._num_classes = check_integer("num_classes", num_classes, 1)
        self.initial_tau = check_positive("tau", tau)
        if backend is not None and backend not in backends.NAMES:
            names = ", ".join(map(repr, backends.NAMES))
            raise ValueError(f"backend: expected None or one of {names}, got {backend!r}")
        self.backend = backend

    def _make_parameters(
        self, shapes: dict[str, tuple[int, ...]], device: Any, dtype: torch.dtype | None
    ) -> None:
        if dtype is not None and dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype: expected float32, float16, bfloat16 or float64, got {dtype}")
        if "raw_tau" in shapes:
            check_representable(self.initial_tau, dtype or torch.get_default_dtype())
        for name, shape in shapes.items():
            value = torch.empty(shape, device=device, dtype=dtype)
            # An empty parameter requires no grad: FSDP does not accept its gradient.
            setattr(self, name, nn.Parameter(value, requires_grad=value.numel() > 0))

    @property
    def num_classes(self) -> int:
        """The number of classes K."""
        centers = self._parameters.get("centers")  # None in a constructor and in some wrappers
        return self._num_classes if centers is None else centers.shape[0]

    @property
    def tau(self) -> Tensor:
        """The temperature τ = softplus(raw_tau), a scalar, float32 (float64 in a float64 module)."""
        return positive(self.raw_tau)

    def loss(self, input: Tensor, target: Tensor, **options: Any) -> Tensor:
        """Compute the cross-entropy without materializing the logits.

        Under DDP call this method in the `forward` of the wrapped module, because DDP synchronizes the gradients of
        calls to `forward` alone.
        Under FSDP2 (`fully_shard`) register it: `torch.distributed.fsdp.register_fsdp_forward_method(head, "loss")`.

        Args:
            input: features, [..., in_features].
            target: classes, [...], int64 or int32.
            options: class_bias, weight, margin, margin_kind, reduction, ignore_index, label_smoothing, sample_negatives,
                generator and return_lse, as in `gistops.constellation_cross_entropy`.

        Returns:
            The loss, a scalar, or [...] with `reduction="none"`; float32, or float64 if an operand is. With `return_lse` also
            the log-sum-exp [...].

        Raises:
            TypeError, ValueError, IndexError, gistops.BackendUnavailable: as for `gistops.constellation_cross_entropy`.
        """
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Redraw all parameters from the default generator of their device.

        It initializes everything, so that it may follow `to_empty()`. A framework that builds a model on the meta device
        must call it for a head that its checkpoint lacks. With Hugging Face: `if isinstance(module, MaxCosineHead):
        module.reset_parameters()` in the `_init_weights` of the `PreTrainedModel`.

        Raises:
            RuntimeError: the head is sharded; `shard_classes` draws the values of a head on the meta device. Or a parameter is
                parametrized, so that its values cannot be written.
        """
        check_whole(self, "reset_parameters")
        check_all_plain(self, "reset_parameters")
        nn.init.normal_(self.centers, std=self.in_features**-0.5)
        self._reset_shared(None)

    def _reset_shared(self, generator: torch.Generator | None) -> None:
        """Initialize the parameters that all classes share.

        Args:
            generator: draws the values on its device; by default the default generator of the parameters' device.
        """
        nn.init.constant_(self.raw_tau, inverse_softplus(self.initial_tau))

    def freeze(self) -> FrozenClassifier:
        """Return a copy for inference, without parameters and with precomputed norms; the head does not change.

        `FrozenClassifier` says what the copy can do. Its logits and predictions have the bits of the head's.

        Raises:
            RuntimeError: the head is sharded.
        """
        check_whole(self, "freeze")
        classifier = self._classifier()
        # Without displacements the logits need no transform, but a state dict with displacements will.
        transform = getattr(self, "transform", classifier.transform)
        return FrozenClassifier(
            classifier._replace(transform=transform), self._inference_weights(), self.backend
        )

    def unfreeze(self) -> MaxCosineHead:
        """Return the head. Deprecated: `freeze()` returns a copy, so that there is nothing to undo."""
        warnings.warn("unfreeze: freeze() returns a copy and does not change the head", FutureWarning, 2)
        return self

    def _inference_weights(self) -> dict[str, Tensor]:
        """Return the parameters that the logits depend on."""
        return {"centers": self.centers, "raw_tau": self.raw_tau}

    @torch.inference_mode(False)  # the new parameters are trainable
    @torch.no_grad()
    def add_classes(self, num: int, *, generator: torch.Generator | None = None) -> None:
        """Add classes after the present ones. Their centers are drawn as those of a new head.

        All other values stay. `centers` (and `random_centers` of a `GistClassifier`) become new parameters. Create the
        optimizer (and a DDP or FSDP wrapper) anew afterward, because the old ones do not train the new parameters.

        Args:
            num: number of classes to add, at least 1.
            generator: draws the values, on its own device. By default the CPU's default generator, so that the values
                do not depend on the module's device.

        Raises:
            RuntimeError: the centers are parametrized or sharded.
            TypeError, ValueError: an argument is of the wrong kind or out of range; the message names it.
        """
        num = check_integer("num", num, 1)
        generator = check_generator(generator)
        check_plain(self, "add_classes", self._per_class)
        check_whole(self, "add_classes")
        for name in self._per_class:
            old = self._parameters.get(name)
            if old is None:  # a subclass may share the centers of its streams
                continue
            rows = torch.randn(num, *old.shape[1:], generator=generator, device=generator.device)
            rows = (rows * self.in_features**-0.5).to(old.device, old.dtype)
            values = torch.cat([old.detach(), rows])
            setattr(self, name, nn.Parameter(values, requires_grad=old.requires_grad))
        self._num_classes = self.centers.shape[0]
