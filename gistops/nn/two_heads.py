"""A head for inference that predicts from two heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .. import backends
from .._checks import check_class_vector, check_classifier, check_some_classes
from .._classifier import Classifier
from .._dtensor import is_dtensor, local
from .._functorch import transforms_active
from .._numbers import check_integer
from ..backends.chunked.best import BestSoFar, best_first
from ..functional.leading import restore, rows
from ..functional.logits import checked_logits, frozen_logits
from ..functional.logits_dtype import check_logits_dtype
from ..operators.registry import compute_dtype, is_dynamic
from .frozen import FrozenClassifier
from .head import MaxCosineHead
from .prediction import Predictor

#: Scores per chunk of classes in predictions, and the least classes per chunk.
CHUNK_ELEMENTS = 1 << 24
CPU_CHUNK_ELEMENTS = 1 << 22
LEAST_CHUNK = 256


class TwoHeadClassifier(Predictor):
    """A classifier that predicts from two heads: its logits are the sum of their logits and `class_bias`.

    `GistClassifier.export(heads="both")` returns one. Softmax of the sum is softmax over the classes k of

        log p_balanced(k) + log p_random(k) + class_bias_k,

    because the logarithms of probabilities are the logits minus a number that is the same for all classes. The random
    stream of a `GistClassifier` has learned the frequencies of the classes, so that `class_bias` is typically the negative log
    prior.

    Logits are those of two passes, one per head, and a sum. `predict` and `predict_topk` compute the logits in chunks of
    classes: about 2²² scores per head on the CPU and 2²⁴ on a GPU, with at least 256 classes per chunk. A compiled or exported
    program with dynamic sizes has one chunk, all classes. The slots are those of the balanced and of the random head,
    [..., 2]: `predict_topk(input, k).slots` is [..., k, 2].

    The two heads are submodules, so that the names in the state dict are those of the heads after "balanced." and
    "random.". Each has its own copy of what a `GistClassifier` shares, such as the displacements. `SlotUsage` takes one of them.
    For a loss, use `torch.nn.functional.cross_entropy` of the logits.

    Args:
        balanced: a head of `gistops.nn`, or a frozen one; it becomes a submodule.
        random: another head for as many features and classes, on the same device.
        class_bias: added to the logits, [num_classes], floating-point; None for zeros. The module has a copy, a buffer of
            the dtype of the logits (float32, or float64 if a head has it) until the module is cast.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or does not fit; the message names it.
    """

    class_bias: Tensor

    def __init__(
        self,
        balanced: MaxCosineHead | FrozenClassifier,
        random: MaxCosineHead | FrozenClassifier,
        class_bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        for name, head in (("balanced", balanced), ("random", random)):
            if not isinstance(head, MaxCosineHead | FrozenClassifier):
                raise TypeError(f"{name}: expected a head of gistops.nn, got {type(head).__name__}")
        for name in ("in_features", "num_classes"):
            expected, got = getattr(balanced, name), getattr(random, name)
            if got != expected:
                raise ValueError(f"random: expected {name} {expected}, as balanced, got {got}")
        self.balanced, self.random = balanced, random
        if is_dtensor(balanced._classifier().centers) != is_dtensor(random._classifier().centers):
            raise TypeError("random: expected a head that is sharded if and only if balanced is")
        centers = local(balanced._classifier().centers.detach())
        dtype = compute_dtype(centers, random._classifier().centers)
        if class_bias is None:
            bias = centers.new_zeros(self.num_classes, dtype=dtype)
        else:
            check_class_vector("class_bias", class_bias, self.num_classes, centers)
            bias = class_bias.detach().to(dtype, copy=True)
        self.register_buffer("class_bias", bias)

    @property
    def in_features(self) -> int:
        """The dimension d of the features."""
        return self.balanced.in_features

    @property
    def num_classes(self) -> int:
        """The number of classes K."""
        return self.balanced.num_classes

    @property
    def frozen(self) -> bool:
        """True for a module that `freeze()` returned."""
        return self.balanced.frozen and self.random.frozen

    @torch.inference_mode(False)  # autograd cannot save the tensors of inference mode
    def freeze(self) -> TwoHeadClassifier:
        """Return a copy for inference with frozen heads, a `FrozenClassifier` each; the module itself if it is frozen.

        Logits and predictions have the bits of the module's.
        """
        if self.frozen:
            return self
        return TwoHeadClassifier(self.balanced.freeze(), self.random.freeze(), self.class_bias).eval()

    def forward(
        self, input: Tensor, return_slots: bool = False, *, logits_dtype: torch.dtype | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the logits of all classes.

        Args:
            input: features, [..., in_features], as for each head.
            return_slots: also return the winning slots.
            logits_dtype: as for each head. The sum is computed in the wide dtype and rounded once.

        Returns:
            logits [..., num_classes]. With `return_slots` also the slots in the balanced and the random head,
            [..., num_classes, 2], uint8.

        Raises:
            TypeError, ValueError, gistops.BackendUnavailable: as for `gistops.constellation_logits`.
        """
        if return_slots:
            (logits, slots), (others, other_slots) = (
                self.balanced(input, return_slots=True),
                self.random(input, return_slots=True),
            )
        else:
            logits, others = self.balanced(input), self.random(input)
        dtype = check_logits_dtype(logits_dtype, input, self.balanced._classifier())
        logits = _sum(logits, others, self.class_bias)
        logits = logits if dtype is None else logits.to(dtype)
        return (logits, torch.stack([slots, other_slots], -1)) if return_slots else logits

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_classes={self.num_classes}"

    def _topk(self, input: Tensor, k: int, class_bias: Tensor | None, return_lse: bool) -> tuple[Tensor, ...]:
        classifiers = self.balanced._classifier(), self.random._classifier()
        if is_dtensor(classifiers[0].centers):
            from ..functional.sharded.topk import best_of_shards

            biases = (self.class_bias, class_bias)
            backend = self.balanced.backend
            return best_of_shards(input, classifiers, k, biases, return_lse, backend, self._best)  # type: ignore[no-any-return]
        balanced, random = (check_classifier(input, classifier) for classifier in classifiers)
        classes = check_some_classes(balanced.centers)
        k = check_integer("k", k, 1, classes)
        bias = self.class_bias
        if class_bias is not None:
            bias = bias + check_class_vector("class_bias", class_bias, classes, input)
        values, order, slots, *lse = self._best(rows(input), (balanced, random), k, bias, return_lse)
        found = tuple(restore(t, input) for t in (values, order, slots))
        return *found, *(restore(t, input) for t in lse)

    def _best(
        self,
        x: Tensor,
        classifiers: Sequence[Classifier],
        k: int,
        bias: Tensor,
        return_lse: bool,
        backend: str | None = None,
    ) -> tuple[Tensor, ...]:
        """Return values and classes [B, k] and slots [B, k, 2] of rows [B, d]; with `return_lse` also lse [B].

        Args:
            x: the rows.
            classifiers: those of the balanced and of the random head, checked.
            k: at most the number of their classes.
            bias: added to the logits, [K].
            return_lse: also return the log-sum-exp of the classes.
            backend: not used; each head has its own.
        """
        balanced, random = zip((self.balanced, self.random), classifiers, strict=True)
        best, lse_of_chunks = BestSoFar(k), []
        for chunk in _chunks(x, classifiers[0].centers.shape[0]):
            logits, slots = _logits_of_chunk(x, *balanced, chunk)
            others, other_slots = _logits_of_chunk(x, *random, chunk)
            scores = _sum(logits, others, bias[chunk])
            if return_lse:
                lse_of_chunks.append(scores.logsumexp(1))
            count = min(k, chunk.stop - chunk.start)
            exporting = backends.exporting_to_onnx()  # ONNX cannot express the order of ties
            values, order = scores.topk(count, dim=1) if exporting else best_first(scores, count)
            best.add(values, order + chunk.start, slots.gather(1, order), other_slots.gather(1, order))
        values, order, slots, other_slots = best.result()
        found = (values, order, torch.stack([slots, other_slots], -1))
        return (*found, torch.stack(lse_of_chunks).logsumexp(0)) if return_lse else found


def _sum(logits: Tensor, others: Tensor, bias: Tensor) -> Tensor:
    """Return logits + (others + bias); in-place without gradients, because logits may be large."""
    bias = bias.to(others.dtype)
    if torch.is_grad_enabled() or transforms_active() or logits.dtype != others.dtype:
        return logits + (others + bias)
    return logits.add_(others.add_(bias))


def _chunks(x: Tensor, classes: int) -> Iterable[slice]:
    """Return chunks of classes; one chunk in a graph that serves several sizes."""
    if is_dynamic(x.shape[0], classes):
        return (slice(0, classes),)
    elements = CHUNK_ELEMENTS if x.device.type == "cuda" else CPU_CHUNK_ELEMENTS
    size = max(LEAST_CHUNK, elements // max(1, x.shape[0]))
    return (slice(start, min(start + size, classes)) for start in range(0, classes, size))


def _logits_of_chunk(
    x: Tensor, head: MaxCosineHead | FrozenClassifier, classifier: Classifier, chunk: slice
) -> tuple[Tensor, Tensor]:
    """Return the logits and slots [B, ·] of the classes in a chunk; `classifier` is that of the head, checked."""
    part, norms = classifier._replace(centers=classifier.centers[chunk]), head._known_norms(x)
    if norms is None:
        return checked_logits(x, part, head.backend, True, None)  # type: ignore[return-value]
    return frozen_logits(x, part, norms[:, chunk].contiguous(), True, None)  # type: ignore[return-value]
