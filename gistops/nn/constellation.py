"""A constellation head: one set of centers, and displacements that all classes share."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import MAX_SLOTS
from .._classifier import Classifier, Transform
from .._dtensor import whole
from .._numbers import check_integer, check_positive
from ..functional import constellation_cross_entropy, constellation_logits
from ..operators.registry import compute_dtype
from . import state
from .changes import check_generator, check_plain, distribute_like
from .head import MaxCosineHead
from .usage import SlotUsage, warn_if_zero


class ConstellationClassifier(MaxCosineHead):
    """A classifier whose classes are constellations: logits `τ · max_j cos(f, w_k + δ_j)`, with `δ_0 = 0`.

    GistNet (Liu, Li, Kang, Hua, Vasconcelos, ICCV 2021), equations 4 to 7. All classes share the displacements δ.
    With `num_displacements=0` the module is a plain cosine classifier. `GistClassifier` trains a constellation head
    as the paper does, and its `export()` returns a `ConstellationClassifier`.

    Parameters of the module:
        centers: w, [num_classes, in_features]; entries N(0, 1/in_features), so that a row's norm is about 1.
        displacements: δ, [num_displacements, in_features]; random directions, each of norm
            `displacement_scale` times the mean norm of a center. They are never zero: at zero all slots tie,
            slot 0 wins, and δ gets no gradient.
        raw_tau: [1]; τ = softplus(raw_tau), so that τ stays positive. For large τ the two are almost equal, and
            so are their gradients. (With τ = exp(raw_tau), a step of SGD would change τ about τ² times as much,
            and τ = 16 diverges.) Exclude raw_tau from weight decay, which would shrink τ: the usual rule "no
            decay below two dimensions" excludes it. It has one dimension because FSDP accepts no scalars.
        axis: with `transform="rotation"`, the direction u from which all rotations start, [in_features]; random.
        mlp_in, mlp_out: with `transform="mlp"`, A [hidden_features, 2 in_features] and B [in_features,
            hidden_features]; random. The displacements then start at the centers' norm.

    `load_state_dict` adapts the number of displacements to that of the state dict: a head of the first stage loads the
    state of the second, and the other way round. `displacements`, `axis`, `mlp_in` and `mlp_out` are then new parameters
    (or are removed), which require a gradient if the old displacements did. A state dict with wrong shapes or of another
    transform changes nothing. Load before the optimizer and a wrapper such as DDP are created, or create them anew. Another
    number of classes or features is the usual size mismatch. For `torch.optim.swa_utils.AveragedModel`, load the
    model's state dict into `averaged.module` after `add_displacements()`.

    A module cast to bfloat16 or float16 computes with the accuracy of float32 from its rounded parameters. But
    small optimizer steps are lost in half-precision parameters, in `raw_tau` above all. For training, keep the
    module in float32 and use autocast.

    Args:
        in_features: dimension d of the features.
        num_classes: number of classes K.
        num_displacements: number m of displacements, 0 to 255; the paper's best is 4.
        tau: initial temperature, above 0.
        displacement_scale: initial norm of a displacement relative to a center's norm, above 0. For an MLP, the
            initial distance by which it moves a center, relative to the center's norm.
        transform: effect of a displacement on a center: "translation", "rotation" or "mlp", as in
            `gistops.constellation_logits`.
        hidden_features: width of the MLP's hidden layer; default: a quarter of `in_features`.
        device, dtype: device and dtype of the parameters, as in `torch.nn.Linear`.
        backend: as in `gistops.constellation_logits`.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; the message names it.
    """

    displacements: nn.Parameter
    axis: nn.Parameter
    mlp_in: nn.Parameter
    mlp_out: nn.Parameter
    _warned = False  # set by gistops.nn.usage

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_displacements: int = 4,
        *,
        tau: float = 16.0,
        displacement_scale: float = 0.1,
        transform: Transform = "translation",
        hidden_features: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, tau, backend)
        if transform not in get_args(Transform):
            names = ", ".join(map(repr, get_args(Transform)))
            raise ValueError(f"transform: expected one of {names}, got {transform!r}")
        if hidden_features is not None and transform != "mlp":
            raise ValueError("hidden_features: expected None unless transform='mlp'")
        self.transform = transform
        self.hidden_features = check_integer(
            "hidden_features",
            max(1, self.in_features // 4) if hidden_features is None else hidden_features,
            1,
        )
        num_displacements = check_integer("num_displacements", num_displacements, 0, MAX_SLOTS - 1)
        self.displacement_scale = check_positive("displacement_scale", displacement_scale)
        self._make_parameters(self._parameter_shapes(num_displacements), device, dtype)
        self.reset_parameters()

    def _parameter_shapes(self, num_displacements: int) -> dict[str, tuple[int, ...]]:
        return {
            "centers": (self.num_classes, self.in_features),
            "displacements": (num_displacements, self.in_features),
            "raw_tau": (1,),
            **{name: shape for name, shape in self._transform_shapes().items() if num_displacements},
        }

    def _transform_shapes(self) -> dict[str, tuple[int, ...]]:
        d, hidden = self.in_features, self.hidden_features
        if self.transform == "rotation":
            return {"axis": (d,)}
        return {"mlp_in": (hidden, 2 * d), "mlp_out": (d, hidden)} if self.transform == "mlp" else {}

    def _reset_shared(self, generator: torch.Generator | None) -> None:
        """Draw the parameters that all classes share; generator: as in `_reset_transform`."""
        super()._reset_shared(generator)
        device = self.displacements.device if generator is None else generator.device
        directions = torch.randn(
            self.displacements.shape, generator=generator, device=device, dtype=torch.float32
        )
        self.displacements.copy_(self._scaled(directions, self._initial_scale))
        self._reset_transform(generator)

    @property
    def _initial_scale(self) -> float:
        return 1.0 if self.transform == "mlp" else self.displacement_scale

    def _reset_transform(self, generator: torch.Generator | None) -> None:
        """Draw the parameters of the transform on the device of `generator`; default: the parameters' device."""
        hidden, d = self.hidden_features, self.in_features
        # The input of A is two unit vectors. With this spread of B, the norm of B relu(A ...) is about displacement_scale
        # times the centers' norm.
        spread = {"mlp_out": self.displacement_scale * self._mean_norm() / math.sqrt(hidden * d)}
        for name in self._transform_shapes():
            if (parameter := getattr(self, name, None)) is not None:
                device = parameter.device if generator is None else generator.device
                values = torch.randn(parameter.shape, generator=generator, device=device)
                parameter.copy_(values.to(parameter.device) * spread.get(name, 1.0))

    def _mean_norm(self) -> Tensor:
        centers = self.centers.detach()
        norm = whole(torch.linalg.vector_norm(centers, dim=1, dtype=compute_dtype(centers)).mean())
        return torch.where(norm > 0, norm, 1.0)  # displacements stay nonzero if all centers are zero

    def _scaled(self, directions: Tensor, scale: float) -> Tensor:
        """Scale `directions` [m, d] to `scale` times the centers' mean norm, on the centers' device."""
        norm = self._mean_norm()
        return F.normalize(directions.to(norm.device), dim=1) * (scale * norm)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        """Adapt the number of displacements to that of the state dict, then load; other shapes must match."""
        given = state.entries(state_dict, prefix)
        shapes = {name: tuple(p.shape) for name, p in self._parameters.items() if p is not None}
        num, new = self.num_displacements, {}
        if "displacements" in shapes:  # a parametrization has other entries
            if state.is_matrix(value := given.get("displacements"), self.in_features):
                num = min(len(value), MAX_SLOTS - 1)
            new = self._transform_shapes() if num and not self.num_displacements else {}
            shapes |= {"displacements": (num, self.in_features)} | new
        assign = local_metadata.get("assign_to_params_buffers", False)
        found = state.errors(given, shapes, prefix, self.transform, assign)
        found += state.missing(given, new, prefix)
        if found and not self._load_state_dict_pre_hooks:  # a hook may change the entries
            args[-1].extend(found)
            missing_keys += [prefix + name for name in new if strict and name not in given]
            return
        if num != self.num_displacements and not found:
            self._set_num_displacements(num)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)

    @torch.inference_mode(False)  # the new parameters are trainable
    @torch.no_grad()
    def _set_num_displacements(self, num: int) -> None:
        """Replace the displacements by `num` others; add or remove the parameters of the transform.

        The values hold until a state dict is loaded. They do not come from the default generator, so that loading leaves
        the random numbers of a run as they are.
        """
        old, generator = self.displacements, torch.Generator().manual_seed(0)
        directions = torch.randn(num, self.in_features, generator=generator, device="cpu")
        values = self._scaled(directions, self._initial_scale).to(old.dtype)
        # An empty parameter never requires grad; the head's other parameters tell if the head is trained.
        trained = any(p.requires_grad for p in ([old] if len(old) else self.parameters(recurse=False)))
        self.displacements = nn.Parameter(values, requires_grad=num > 0 and trained)
        if not num:
            for name in self._transform_shapes():
                delattr(self, name)
        elif not len(old):
            self._make_parameters(self._transform_shapes(), old.device, old.dtype)
            self._reset_transform(generator)
            for name in self._transform_shapes():
                getattr(self, name).requires_grad_(trained)
        distribute_like(self, old, ("displacements", *self._transform_shapes()))

    @property
    def num_displacements(self) -> int:
        """The number m of displacements; a class has m + 1 slots."""
        return self.displacements.shape[0]

    def forward(
        self, input: Tensor, return_slots: bool = False, *, logits_dtype: torch.dtype | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the logits of all classes.

        Args:
            input: features, [..., in_features], float32, float16, bfloat16 or float64; they need not be normalized.
            return_slots: also return the winning slot of each class.
            logits_dtype: the dtype of the logits, as in `gistops.constellation_logits`. An argument of the call, not of the
                module, because the dtype of input and autocast may differ from call to call.

        Returns:
            logits [..., num_classes], float32 (float64 for float64) unless `logits_dtype` is given; with `return_slots`
            also slots [..., num_classes], uint8; slot 0 is the bare center.

        Raises:
            TypeError, ValueError, gistops.BackendUnavailable: as for `gistops.constellation_logits`.
        """
        tensors = (input, self.centers, self.displacements, self.tau)
        options = self._transform() | {"logits_dtype": logits_dtype, "backend": self.backend}
        return constellation_logits(*tensors, return_slots=return_slots, **options)

    def loss(self, input: Tensor, target: Tensor, **options: Any) -> Tensor:
        tensors = (input, self.centers, self.displacements, self.tau)
        options = self._transform() | options
        return constellation_cross_entropy(*tensors, target, backend=self.backend, **options)  # type: ignore[return-value]

    loss.__doc__ = MaxCosineHead.loss.__doc__

    def _inference_weights(self) -> dict[str, Tensor]:
        names = ConstellationClassifier._parameter_shapes(self, self.num_displacements)
        return {name: getattr(self, name) for name in names}

    def _classifier(self) -> Classifier:
        return Classifier(self.centers, self.displacements, self.tau, **self._transform())

    def _transform(self) -> dict[str, Any]:
        if not self.num_displacements or self.transform == "translation":
            return {}
        if self.transform == "rotation":
            return {"transform": "rotation", "axis": self.axis}
        return {"transform": "mlp", "mlp": (self.mlp_in, self.mlp_out)}

    @torch.inference_mode(False)  # the new parameters are trainable
    @torch.no_grad()
    def add_displacements(
        self,
        num: int = 4,
        *,
        values: Tensor | None = None,
        scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Add displacements to a head created with `num_displacements=0`: the paper's second stage.

        All other parameters keep their values. `displacements`, and the parameters of a rotation or an MLP, become
        new trainable parameters on the device and in the dtype of the old `displacements`. Create the optimizer (and
        a DDP or FSDP wrapper) anew afterward, because the old ones do not train the new parameters.

        Args:
            num: number of displacements, 1 to 255.
            values: initial displacements, [m, in_features], floating-point; `num` is then ignored. By default
                random directions, of norm `scale` times the mean norm of the centers.
            scale: above 0; default: the relative norm of a new module's displacements.
            generator: draws all values, on its own device. By default the CPU's default generator, so that the
                values do not depend on the module's device. A sharded head has the values of rank 0.

        Raises:
            RuntimeError: the head has displacements already, or they are parametrized.
            TypeError, ValueError: an argument is of the wrong kind or out of range; the message names it.
        """
        if self.num_displacements:
            raise RuntimeError(
                f"add_displacements: expected a head made with num_displacements=0, this one has "
                f"{self.num_displacements}; assign to .displacements.data to change their values"
            )
        scale = self._initial_scale if scale is None else check_positive("scale", scale)
        generator = check_generator(generator)
        check_plain(self, "add_displacements", ("displacements",))
        if values is None:
            num = check_integer("num", num, 1, MAX_SLOTS - 1)
            device = generator.device
            values = self._scaled(
                torch.randn(num, self.in_features, generator=generator, device=device), scale
            )
        elif not isinstance(values, Tensor) or not values.is_floating_point():
            got = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"values: expected a floating-point torch.Tensor, got {got}")
        elif values.dim() != 2 or values.shape[1] != self.in_features or not 1 <= len(values) < MAX_SLOTS:
            raise ValueError(
                f"values: expected shape [m, {self.in_features}] with 1 <= m <= {MAX_SLOTS - 1}, "
                f"got {list(values.shape)}"
            )
        old = self.displacements
        self.displacements = nn.Parameter(values.detach().to(old.device, old.dtype, copy=True))
        self._make_parameters(self._transform_shapes(), old.device, old.dtype)
        self._reset_transform(generator)
        distribute_like(self, old, ("displacements", *self._transform_shapes()))
        warn_if_zero(self)

    def slot_usage(self, input: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the share of samples whose own class is won by each slot. For many batches use `SlotUsage`.

        Args:
            input: features, [..., in_features].
            labels: classes, [...], integer. By default a sample's own class is the predicted one.

        Returns:
            shares [num_displacements + 1], float32, which sum to 1.
        """
        usage = SlotUsage(self)
        usage.update(input, labels)
        return usage.shares()

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, num_classes={self.num_classes}"
        text += f", num_displacements={self.num_displacements}"
        if self.transform != "translation":
            text += f", transform={self.transform!r}"
        if self.transform == "mlp":
            text += f", hidden_features={self.hidden_features}"
        return text if self.backend is None else f"{text}, backend={self.backend!r}"
