"""A head for inference, with copies of the weights and their norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._checks import MAX_SLOTS, check_classifier
from .._classifier import Classifier
from ..functional import (
    constellation_cross_entropy,
    constellation_logits,
    subcenter_cross_entropy,
    subcenter_logits,
)
from ..functional.logits import center_norms, frozen_logits
from ..operators.registry import autocast_dtype
from . import state
from .prediction import Predictor
from .temperature import positive


def _copy(name: str) -> property:
    """Return a read-only property whose value is a copy of a weight."""

    def weight(module: FrozenClassifier) -> Tensor:
        if name not in module._names:
            raise AttributeError(f"{name}: expected one of {', '.join(module._names)}")
        with torch.no_grad():
            return module._weight(name).clone()

    return property(weight, doc=f"A copy of the head's `{name}`; changes of the copy have no effect.")


class FrozenClassifier(Predictor):
    """A classifier with fixed weights and, on the CPU, precomputed norms. `head.freeze()` returns one.

    The results have the bits of the head at the time of `freeze()`. Later changes of the head have no effect. The module
    has no parameters and no buffers, so that optimizers, averages of weights and `torch.func.functional_call` cannot
    change its weights without its norms. Three operations change the weights, and each recomputes the norms:

    - `.to()` and its relatives, which move and cast the weights.
    - `load_state_dict()`, which copies the weights.
    - `copy.deepcopy` and pickling, which copy weights and norms together.

    `state_dict()` returns copies of the weights under the names of the head's parameters, so that the state dict of a
    `ConstellationClassifier` or a `SubcenterClassifier` loads into its frozen copy, and the other way round. The read-only
    attributes of these names, such as `centers`, are copies too.

    `torch.distributed.checkpoint` reads and writes the weights, except with `broadcast_from_rank0`, which sends parameters
    and buffers alone: load the head, then freeze it.

    Norms are precomputed on the CPU alone, for translations and sub-centers. (A GPU computes them beside the matrix product.)
    A call whose input requires a gradient computes them anew, and so does a float64 input of float32 weights.
    """

    frozen = True
    _norms: Tensor | None = None
    # Code that walks a state dict, such as torch.distributed.checkpoint, looks up an attribute for each key.
    centers, displacements, raw_tau = _copy("centers"), _copy("displacements"), _copy("raw_tau")
    axis, mlp_in, mlp_out = _copy("axis"), _copy("mlp_in"), _copy("mlp_out")

    def __init__(self, classifier: Classifier, weights: Mapping[str, Tensor], backend: str | None) -> None:
        """Copy the weights.

        Args:
            classifier: the arguments of the head's logits; its transform alone is used.
            weights: the parameters of the head by name, without those of training alone.
            backend: as in `gistops.constellation_logits`.
        """
        super().__init__()
        self.backend = backend
        self._transform = classifier.transform
        self._names = tuple(weights)
        with (
            torch.inference_mode(False),
            torch.no_grad(),
        ):  # autograd cannot save the tensors of inference mode
            for name, weight in weights.items():
                setattr(self, f"_{name}", weight.detach().clone())
            self._make_norms()
        self.eval()

    @property
    def in_features(self) -> int:
        """The dimension d of the features."""
        return self._weight("centers").shape[-1]

    @property
    def num_classes(self) -> int:
        """The number of classes K."""
        return self._weight("centers").shape[0]

    @property
    def num_displacements(self) -> int:
        """The number of slots of a class besides slot 0."""
        if self._transform == "subcenters":
            return self._weight("centers").shape[1] - 1
        return self._weight("displacements").shape[0]

    @property
    def tau(self) -> Tensor:
        """The temperature τ, a scalar, float32 (float64 in a float64 module)."""
        return positive(self._weight("raw_tau"))

    def freeze(self) -> FrozenClassifier:
        """Return the module itself."""
        return self

    def forward(
        self, input: Tensor, return_slots: bool = False, *, logits_dtype: torch.dtype | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the logits [..., num_classes]; with `return_slots` also the winning slots.

        Args, returns and errors: as for the head.
        """
        norms = self._known_norms(input)
        if norms is not None:
            classifier = check_classifier(input, self._classifier())
            return frozen_logits(input, classifier, norms, return_slots, logits_dtype)
        function = subcenter_logits if self._transform == "subcenters" else constellation_logits
        arguments, options = self._arguments()
        logits: Tensor | tuple[Tensor, Tensor]
        options |= {"logits_dtype": logits_dtype, "backend": self.backend}
        logits = function(input, *arguments, return_slots=return_slots, **options)
        return logits

    def loss(self, input: Tensor, target: Tensor, **options: Any) -> Tensor:
        """Compute the cross-entropy without materializing the logits. Arguments and errors are those of the head."""
        subcenters = self._transform == "subcenters"
        function: Any = subcenter_cross_entropy if subcenters else constellation_cross_entropy
        arguments, transform = self._arguments()
        loss: Tensor = function(input, *arguments, target, backend=self.backend, **transform, **options)
        return loss

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, num_classes={self.num_classes}"
        text += f", num_displacements={self.num_displacements}, transform={self._transform!r}"
        return text if self.backend is None else f"{text}, backend={self.backend!r}"

    def _weight(self, name: str) -> Tensor:
        weight: Tensor = getattr(self, f"_{name}")
        return weight

    def _arguments(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Return the arguments of the public functions: tensors and the options of the transform."""
        a = self._classifier()
        if a.transform == "subcenters":
            return (a.centers, a.tau), {}
        return (a.centers, a.displacements, a.tau), {
            "transform": a.transform,
            "axis": a.axis,
            "mlp": a.mlp,
        }

    def _classifier(self) -> Classifier:
        centers = self._weight("centers")
        if self._transform == "subcenters":
            return Classifier(centers, centers.new_empty(0, centers.shape[-1]), self.tau, "subcenters")
        displacements = self._weight("displacements")
        transform = self._transform if displacements.shape[0] else "translation"
        axis = self._weight("axis") if transform == "rotation" else None
        mlp = (self._weight("mlp_in"), self._weight("mlp_out")) if transform == "mlp" else None
        return Classifier(centers, displacements, self.tau, transform, axis, mlp)

    def _known_norms(self, input: Tensor) -> Tensor | None:
        norms = self._norms
        if (
            norms is None
            or not isinstance(input, Tensor)
            or (torch.is_grad_enabled() and input.requires_grad)
        ):
            return None
        classifier = self._classifier()
        if torch.is_autocast_enabled("cpu"):
            dtype = autocast_dtype(torch.ops.gistops, "cpu", self.in_features)
            if dtype not in (None, classifier.centers.dtype) or dtype not in (None, input.dtype):
                return None  # autocast rounds what the norms were computed from, or the input
        # Rounded norms would give a float64 input other bits than the head's.
        return norms if norms.dtype == classifier.compute_dtype(input) else None

    def _make_norms(self) -> None:
        centers = self._weight("centers")
        cpu = not centers.is_meta and backends.choose(centers.device.type, self.backend) == "cpu"
        classifier = self._classifier()
        with_norms = cpu and classifier.transform in ("translation", "subcenters")
        self._norms = center_norms(classifier) if with_norms else None

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenClassifier:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with torch.inference_mode(False), torch.no_grad():
            for name in self._names:
                setattr(self, f"_{name}", fn(self._weight(name)))
            self._make_norms()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._names:  # copies, because a change of a state dict must not change the weights
            destination[prefix + name] = self._weight(name).clone()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = state.entries(state_dict, prefix)
        shapes, new = self._shapes_after(given)
        assign = local_metadata.get("assign_to_params_buffers", False)
        found = state.errors(given, shapes, prefix, self._transform, assign)
        found += state.missing(given, new, prefix)
        if (
            strict
        ):  # torch passes True and decides later if names that are missing or unexpected raise an error
            missing_keys += [prefix + name for name in shapes if name not in given]
            unexpected_keys += [prefix + name for name in given if name not in shapes]
        if found:
            error_msgs += found
            return
        with torch.inference_mode(False), torch.no_grad():
            loaded = {}
            for name in shapes.keys() & given.keys():
                value, old = given[name], self._weight("displacements" if name in new else name)
                device, dtype = (value.device, value.dtype) if assign else (old.device, old.dtype)
                loaded[name] = value.detach().to(device, dtype, copy=True)
            for name in set(self._names) - shapes.keys():
                delattr(self, f"_{name}")
            for name, value in loaded.items():
                setattr(self, f"_{name}", value)
            self._names = tuple(shapes)
            self._make_norms()

    def _shapes_after(self, given: Mapping[str, Any]) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
        """Return the shapes of the weights once a state dict is loaded, and the names that are new.

        The number of displacements follows the state dict, as that of the head does. Without displacements a rotation
        has no axis and an MLP no weights.
        """
        shapes = {name: tuple(self._weight(name).shape) for name in self._names}
        d, value = self.in_features, given.get("displacements")
        if self._transform == "subcenters" or not state.is_matrix(value, d):
            return shapes, ()
        num = min(len(value), MAX_SLOTS - 1)
        shapes["displacements"] = (num, d)
        names = state.TRANSFORM_WEIGHTS.get(self._transform, ())
        if not num:
            return {name: shape for name, shape in shapes.items() if name not in names}, ()
        first = given.get("mlp_in")
        hidden = max(1, len(first)) if state.is_matrix(first, 2 * d) else 1
        possible = {"axis": (d,), "mlp_in": (hidden, 2 * d), "mlp_out": (d, hidden)}
        new = tuple(name for name in names if name not in shapes)
        return shapes | {name: possible[name] for name in new}, new
