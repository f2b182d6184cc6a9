"""GistNet's head for training: two streams of samples, and displacements that both streams share."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_class_vector
from .._dtensor import is_dtensor
from ..functional import constellation_cross_entropy, constellation_logits, constellation_topk
from .constellation import ConstellationClassifier
from .temperature import inverse_softplus, positive
from .two_heads import TwoHeadClassifier
from .usage import warn_if_zero


class GistClassifier(ConstellationClassifier):
    """GistNet's two-stream head (Liu, Li, Kang, Hua, Vasconcelos, ICCV 2021): train with `losses()`.

    The class-balanced stream trains the centers w, which are kept for inference. The random stream, in which the
    frequent classes dominate, trains centers v of its own and the displacements δ. Through δ the few-shot classes
    profit from the frequent ones.

    Routing of the gradients (a blocked gradient is exactly zero, by a `detach()` in `losses()`):

    | parameter | shape | gets its gradient from |
    |---|---|---|
    | `centers` (w) | [num_classes, in_features] | balanced loss |
    | `random_centers` (v) | [num_classes, in_features] | random loss |
    | `displacements` (δ) | [num_displacements, in_features] | random loss; detached in the balanced loss |
    | `axis`, or `mlp_in` and `mlp_out` | as in `ConstellationClassifier` | random loss; detached in the balanced loss |
    | `raw_tau` | [1] | balanced loss |
    | `raw_random_tau` | [1] | random loss |

    The features of each stream get their gradient from the stream's own loss. `forward()` computes the logits of w
    and blocks no gradient: a loss of these logits would train the displacements too. Training has two stages, the
    first without displacements (`num_displacements=0`), the second after `add_displacements()`.

    Initial values, weight decay, arguments and errors are those of `ConstellationClassifier`.
    """

    random_centers: nn.Parameter
    raw_random_tau: nn.Parameter
    _checked_for_zero = False
    _per_class = ("centers", "random_centers")

    def _parameter_shapes(self, num_displacements: int) -> dict[str, tuple[int, ...]]:
        return {
            **super()._parameter_shapes(num_displacements),
            "random_centers": (self.num_classes, self.in_features),
            "raw_random_tau": (1,),
        }

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Redraw all parameters from the default generator of their device."""
        super().reset_parameters()
        nn.init.normal_(self.random_centers, std=self.in_features**-0.5)

    def _reset_shared(self, generator: torch.Generator | None) -> None:
        super()._reset_shared(generator)
        nn.init.constant_(self.raw_random_tau, inverse_softplus(self.initial_tau))

    @property
    def random_tau(self) -> Tensor:
        """The temperature of the random stream, as `tau`."""
        return positive(self.raw_random_tau)

    def random_logits(self, input: Tensor) -> Tensor:
        """Compute the logits of the random stream's centers v, [..., num_classes]; input as in `forward`."""
        tensors = (input, self.random_centers, self.displacements, self.random_tau)
        logits: Tensor = constellation_logits(*tensors, backend=self.backend, **self._transform())
        return logits

    @torch.no_grad()
    def random_predict(self, input: Tensor, *, class_bias: Tensor | None = None) -> Tensor:
        """Return the class with the largest logit of the random stream's centers v; arguments as in `predict`."""
        tensors = (input, self.random_centers, self.displacements, self.random_tau)
        options = self._transform() | {"class_bias": class_bias, "backend": self.backend}
        return constellation_topk(*tensors, 1, **options)[1][..., 0]

    def losses(
        self,
        x_balanced: Tensor,
        y_balanced: Tensor,
        x_random: Tensor,
        y_random: Tensor,
        *,
        balanced_bias: Tensor | None = None,
        label_smoothing: float = 0.0,
        sample_negatives: float | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the mean cross-entropy of each stream. The class's docstring describes the routing of gradients.

        The paper minimizes `loss_random + 0.5 * loss_balanced`. Under DDP call this method in the `forward` of the
        wrapped module, because DDP synchronizes the gradients of calls to `forward` alone.
        Under FSDP2 (`fully_shard`) register it: `torch.distributed.fsdp.register_fsdp_forward_method(head, "losses")`.

        Args:
            x_balanced: features of a class-balanced batch, [..., in_features], as in `forward`.
            y_balanced: classes, [...], int64 or int32; or class probabilities, [..., num_classes], floating-point.
            x_random: features of a random batch, [..., in_features].
            y_random: classes, [...], or class probabilities, [..., num_classes].
            balanced_bias: added to the logits of the balanced loss, [num_classes], floating-point. With log class
                frequencies, the balanced loss may take random samples in place of a class-balanced batch, also those of
                the random stream (balanced softmax; Ren et al., NeurIPS 2020).
            label_smoothing: as in `gistops.constellation_cross_entropy`, for both streams.
            sample_negatives, generator: as in `gistops.constellation_cross_entropy`; each stream draws its own classes.

        Returns:
            (loss_balanced, loss_random), scalars, float32 (float64 for float64); NaN for an empty batch.

        Raises:
            TypeError, ValueError, gistops.BackendUnavailable: as for `gistops.constellation_logits`, or the
                targets do not fit.
        """
        if not torch.compiler.is_compiling() and not self._checked_for_zero:
            self._checked_for_zero = True  # once, because the check synchronizes with a GPU
            warn_if_zero(self)
        if balanced_bias is not None and not is_dtensor(self.centers):
            check_class_vector("balanced_bias", balanced_bias, self.num_classes, self.centers)
        options = {
            "label_smoothing": label_smoothing,
            "sample_negatives": sample_negatives,
            "generator": generator,
        }
        transform = self._transform()
        balanced = (self.centers, self.displacements.detach(), self.tau)
        random = (self.random_centers, self.displacements, self.random_tau)
        return (
            self._stream_loss(
                "y_balanced", x_balanced, y_balanced, balanced, _detached(transform), balanced_bias, options
            ),
            self._stream_loss("y_random", x_random, y_random, random, transform, None, options),
        )

    def _stream_loss(
        self,
        name: str,
        input: Tensor,
        target: Tensor,
        tensors: tuple[Tensor, Tensor, Tensor],
        transform: dict[str, Any],
        bias: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        sharded = is_dtensor(tensors[0])  # then the loss checks the targets, in all processes together
        if not sharded:
            _check_target(name, target, input.shape[:-1], self.num_classes)
        if not sharded and target.is_floating_point():
            # Probabilities are as large as the logits, so these may be too.
            if options["sample_negatives"] is not None:
                raise ValueError(f"{name}: expected classes with sample_negatives, got probabilities")
            logits = constellation_logits(input, *tensors, backend=self.backend, **transform)
            logits = logits if bias is None else logits + bias
            rows, target = logits.reshape(-1, self.num_classes), target.reshape(-1, self.num_classes)
            smoothing = options["label_smoothing"]
            return F.cross_entropy(rows, target.to(logits.dtype), label_smoothing=smoothing)
        options = {"class_bias": bias, "backend": self.backend} | options | transform
        return constellation_cross_entropy(input, *tensors, target, **options)  # type: ignore[return-value]

    @overload
    def export(
        self, heads: Literal["balanced"] = "balanced", class_bias: None = None
    ) -> ConstellationClassifier: ...

    @overload
    def export(self, heads: Literal["both"], class_bias: Tensor | None = None) -> TwoHeadClassifier: ...

    @torch.inference_mode(False)  # the copy is trainable
    def export(
        self, heads: Literal["balanced", "both"] = "balanced", class_bias: Tensor | None = None
    ) -> ConstellationClassifier | TwoHeadClassifier:
        """Return a head for inference with copies of the parameters.

        By default it is a `ConstellationClassifier` with w, δ and τ, without v. Its logits are those of `forward`, bit for bit.
        With `heads="both"` it is a `TwoHeadClassifier`, whose logits are `forward(x) + (random_logits(x) + class_bias)`, bit
        for bit: a prediction takes two passes. `torch.export.export` accepts both. This method draws no random numbers.

        Args:
            heads: "balanced" or "both".
            class_bias: for `heads="both"`, added to the logits, [num_classes]; typically the negative log prior, because
                the random stream has learned the frequencies of the classes.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind or does not fit; the message names it.
        """
        if heads not in ("balanced", "both"):
            raise ValueError(f"heads: expected 'balanced' or 'both', got {heads!r}")
        if heads == "both":
            random = self._copy({"centers": "random_centers", "raw_tau": "raw_random_tau"})
            return TwoHeadClassifier(self._copy({}), random, class_bias).eval()
        if class_bias is not None:
            raise ValueError("class_bias: expected None with heads='balanced'; `predict` takes a class_bias")
        return self._copy({})

    def _copy(self, names: dict[str, str]) -> ConstellationClassifier:
        """Return a copy of one stream's head; `names` maps its parameters to those of this module where they differ."""
        head = ConstellationClassifier(
            self.in_features,
            self.num_classes,
            self.num_displacements,
            tau=self.initial_tau,
            displacement_scale=self.displacement_scale,
            transform=self.transform,
            hidden_features=self.hidden_features if self.transform == "mlp" else None,
            device="meta",
            dtype=torch.float64,  # holds every initial tau; the copies below replace all parameters
            backend=self.backend,
        )
        for name, _ in list(head.named_parameters()):
            parameter = getattr(self, names.get(name, name))
            copy = parameter.detach().clone()
            setattr(head, name, nn.Parameter(copy, requires_grad=parameter.requires_grad))
        return head.eval()


def _detached(transform: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a transform with its tensors detached."""
    detached = dict(transform)
    if "axis" in detached:
        detached["axis"] = detached["axis"].detach()
    if "mlp" in detached:
        detached["mlp"] = tuple(t.detach() for t in detached["mlp"])
    return detached


def _check_target(name: str, target: object, batch: torch.Size, classes: int) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(target).__name__}")
    if target.is_floating_point():
        fits = target.shape == (*batch, classes)
    else:
        fits = target.dtype in (torch.int64, torch.int32) and target.shape == batch
    if not fits:
        raise ValueError(
            f"{name}: expected int64 or int32 {list(batch)} or floating-point {[*batch, classes]}, "
            f"got {str(target.dtype).removeprefix('torch.')} {list(target.shape)}"
        )
