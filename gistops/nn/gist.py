"""GistNet's head for training: two streams, one set of displacements."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import constellation_cross_entropy, constellation_logits
from .constellation import ConstellationClassifier
from .head import inverse_softplus, positive


class GistClassifier(ConstellationClassifier):
    """GistNet's two-stream head (Liu, Li, Kang, Hua, Vasconcelos, ICCV 2021): train with `losses()`.

    A class-balanced stream trains the centres w that are kept for inference; a random stream, in which the
    frequent classes dominate, trains centres v of its own and the displacements δ, which the few-shot classes
    then share. The gradients are routed, and what is blocked is exactly zero:

    | parameter | shape | gets gradient from |
    |---|---|---|
    | `centers` (w) | [num_classes, in_features] | balanced loss |
    | `random_centers` (v) | [num_classes, in_features] | random loss |
    | `displacements` (δ) | [num_displacements, in_features] | random loss; detached in the balanced one |
    | `axis`; `mlp_in`, `mlp_out` | of a rotation; of an MLP | as δ |
    | `raw_tau` | [1] | balanced loss |
    | `raw_random_tau` | [1] | random loss |

    and the features of each stream from its own loss. `forward()` gives w's logits and routes nothing: a loss
    of them would train the displacements too. Training goes in two stages: the first without displacements
    (`num_displacements=0`), the second after `add_displacements()`.

    Initial values, weight decay, arguments and errors: as `ConstellationClassifier`.
    """

    random_centers: nn.Parameter
    raw_random_tau: nn.Parameter
    _looked = False  # whether the displacements are zero

    def _parameter_shapes(self, num_displacements: int) -> dict[str, tuple[int, ...]]:
        return {
            **super()._parameter_shapes(num_displacements),
            "random_centers": (self.num_classes, self.in_features),
            "raw_random_tau": (1,),
        }

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew, from the default generator of their device."""
        super().reset_parameters()
        nn.init.normal_(self.random_centers, std=self.in_features**-0.5)
        nn.init.constant_(self.raw_random_tau, inverse_softplus(self.initial_tau))

    @property
    def random_tau(self) -> Tensor:
        """The random stream's temperature, like `tau`."""
        return positive(self.raw_random_tau)

    def random_logits(self, input: Tensor) -> Tensor:
        """Logits of the random stream's centres v, [B, num_classes]; input as in `forward`."""
        tensors = (input, self.random_centers, self.displacements, self.random_tau)
        logits: Tensor = constellation_logits(*tensors, backend=self.backend, **self._transform())
        return logits

    def losses(
        self, x_balanced: Tensor, y_balanced: Tensor, x_random: Tensor, y_random: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean cross-entropies of the two streams, with the gradients routed as the class describes.

        The paper minimises `loss_random + 0.5 * loss_balanced`. Under DDP call it in the `forward` of the
        module that is wrapped, because DDP sees to gradients of calls to `forward` only.

        Args:
            x_balanced: features of a class-balanced batch, [B, in_features], as in `forward`.
            y_balanced: their classes, [B], int64 or int32; or class probabilities, [B, num_classes], floating.
            x_random: features of a random batch, [B', in_features].
            y_random: their classes, [B'], or class probabilities, [B', num_classes].

        Returns:
            (loss_balanced, loss_random), scalars, float32 (float64 for float64); NaN for an empty batch.

        Raises:
            TypeError, ValueError, gistops.BackendUnavailable: as `gistops.constellation_logits`, or targets
                that do not fit.
        """
        if not torch.compiler.is_compiling() and not self._looked:
            self._looked = True  # once, because on a GPU the host must wait for the answer
            self._warn_if_zero()
        transform = self._transform()
        balanced = (self.centers, self.displacements.detach(), self.tau)
        random = (self.random_centers, self.displacements, self.random_tau)
        return (
            self._stream_loss("y_balanced", x_balanced, y_balanced, balanced, _detached(transform)),
            self._stream_loss("y_random", x_random, y_random, random, transform),
        )

    def _stream_loss(
        self,
        name: str,
        input: Tensor,
        target: Tensor,
        tensors: tuple[Tensor, Tensor, Tensor],
        transform: dict[str, Any],
    ) -> Tensor:
        _check_target(name, target, input.shape[0], self.num_classes)
        if target.is_floating_point():  # probabilities are as large as logits: hold both
            logits = constellation_logits(input, *tensors, backend=self.backend, **transform)
            return F.cross_entropy(logits, target.to(logits.dtype))
        return constellation_cross_entropy(  # type: ignore[return-value]
            input, *tensors, target, backend=self.backend, **transform
        )

    def export(self) -> ConstellationClassifier:
        """The head for inference alone: a `ConstellationClassifier` with copies of w, δ and τ.

        v and its temperature are left out. The result's logits are those of `forward`, bit for bit; it draws
        no random numbers, and `torch.export.export` takes it.
        """
        head = ConstellationClassifier(
            self.in_features,
            self.num_classes,
            self.num_displacements,
            tau=self.initial_tau,
            displacement_scale=self.displacement_scale,
            transform=self.transform,
            hidden_features=self.hidden_features if self.transform == "mlp" else None,
            device="meta",
            backend=self.backend,
        )
        for name, _ in list(head.named_parameters()):
            own = getattr(self, name)
            setattr(head, name, nn.Parameter(own.detach().clone(), requires_grad=own.requires_grad))
        return head.eval()


def _detached(transform: dict[str, Any]) -> dict[str, Any]:
    """The same, with its tensors detached."""
    made = dict(transform)
    if "axis" in made:
        made["axis"] = made["axis"].detach()
    if "mlp" in made:
        made["mlp"] = tuple(t.detach() for t in made["mlp"])
    return made


def _check_target(name: str, target: object, batch: int, classes: int) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(target).__name__}")
    if target.is_floating_point():
        fits = target.shape == (batch, classes)
    else:
        fits = target.dtype in (torch.int64, torch.int32) and target.shape == (batch,)
    if not fits:
        raise ValueError(
            f"{name}: expected int64 or int32 [{batch}] or floating-point [{batch}, {classes}], "
            f"got {str(target.dtype).removeprefix('torch.')} {list(target.shape)}"
        )
