"""Argument checks of the public functions. Every message names the argument, what was expected and what came."""

from __future__ import annotations

import math
import sys
from numbers import Integral, Real
from typing import Literal

import torch
from torch import Tensor

from ._classifier import Classifier, LossOptions, no_displacements
from ._functorch import is_wrapped

MAX_SLOTS = 256  # slots are stored as uint8
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _floating(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if not torch.compiler.is_compiling() and "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import DTensor

        if isinstance(value, DTensor):
            raise TypeError(
                f"{name}: expected a local torch.Tensor, got a DTensor; call .to_local() or .full_tensor() first"
            )
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {value.dtype}")
    return value


def _shape(value: Tensor) -> str:
    return str(list(value.shape))


def check_constellation(
    input: object,
    centers: object,
    displacements: object,
    tau: object,
    transform: Literal["translation", "rotation", "mlp"] = "translation",
    axis: Tensor | None = None,
    mlp: tuple[Tensor, Tensor] | None = None,
) -> Classifier:
    """Check the arguments of a constellation's logits; return all but input.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or is a DTensor.
        ValueError: a shape or device does not fit the others.
    """
    input = _floating("input", input)
    centers = _floating("centers", centers)
    displacements = _floating("displacements", displacements)
    if input.dim() != 2:
        raise ValueError(f"input: expected shape [B, d], got {_shape(input)}")
    d = input.shape[1]
    if d == 0:
        raise ValueError(f"input: expected shape [B, d] with d >= 1, got {_shape(input)}")
    for name, value, rows in (("centers", centers, "K"), ("displacements", displacements, "m")):
        if value.dim() != 2 or value.shape[1] != d:
            raise ValueError(
                f"{name}: expected shape [{rows}, {d}] to match input's last dimension, got {_shape(value)}"
            )
        if value.device != input.device:
            raise ValueError(f"{name}: expected device {input.device} to match input, got {value.device}")
    if displacements.shape[0] >= MAX_SLOTS:
        raise ValueError(
            f"displacements: expected at most {MAX_SLOTS - 1} rows (slots are uint8), got {_shape(displacements)}"
        )
    _check_transform(transform, axis, mlp, input)
    return _with_tau(tau, input, Classifier(centers, displacements, input, transform, axis, mlp))


def check_subcenters(input: object, centers: object, tau: object) -> Classifier:
    """Check the arguments of the logits of sub-centers [K, M, d]; return all but input. Raises as `check_constellation`."""
    input = _floating("input", input)
    centers = _floating("centers", centers)
    if input.dim() != 2 or input.shape[1] == 0:
        raise ValueError(f"input: expected shape [B, d] with d >= 1, got {_shape(input)}")
    if centers.dim() != 3 or centers.shape[2] != input.shape[1]:
        raise ValueError(
            f"centers: expected shape [K, M, {input.shape[1]}] to match input's last dimension, "
            f"got {_shape(centers)}"
        )
    if not 1 <= centers.shape[1] <= MAX_SLOTS:
        raise ValueError(
            f"centers: expected 1 to {MAX_SLOTS} sub-centers per class (slots are uint8), got {_shape(centers)}"
        )
    if centers.device != input.device:
        raise ValueError(f"centers: expected device {input.device} to match input, got {centers.device}")
    return _with_tau(tau, input, Classifier(centers, no_displacements(centers), input, "subcenters"))


def check_classifier(input: Tensor, classifier: Classifier) -> Classifier:
    """Check the arguments of any logits. Raises as `check_constellation`."""
    if classifier.transform == "subcenters":
        return check_subcenters(input, classifier.centers, classifier.tau)
    return check_constellation(input, *classifier)  # type: ignore[arg-type]


def _with_tau(tau: object, input: Tensor, classifier: Classifier) -> Classifier:
    """Return the classifier with tau checked; a number becomes a tensor of the dtype of the logits."""
    if isinstance(tau, (int, float)) and not isinstance(tau, bool):
        tau = on_device(tau, classifier.compute_dtype(input), input.device)
    tau = _floating("tau", tau)
    if tau.numel() != 1:
        raise ValueError(f"tau: expected a tensor of one element, got shape {_shape(tau)}")
    if tau.device != input.device:
        raise ValueError(f"tau: expected device {input.device} to match input, got {tau.device}")
    return classifier._replace(tau=tau)


def on_device(number: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a number as a tensor filled on its device: a copy from the host would wait and break a CUDA graph."""
    return torch.full((), float(number), dtype=dtype, device=device)


def check_class_vector(name: str, value: object, classes: int, input: Tensor) -> Tensor:
    """Check a floating-point tensor [K] on the device of input. Raises TypeError or ValueError that names it."""
    value = _floating(name, value)
    if value.shape != (classes,):
        raise ValueError(f"{name}: expected shape [{classes}], one element per class, got {_shape(value)}")
    if value.device != input.device:
        raise ValueError(f"{name}: expected device {input.device} to match input, got {value.device}")
    return value


def check_some_classes(centers: Tensor) -> int:
    """Return the number of classes K.

    Raises:
        ValueError: K is 0.
    """
    if centers.shape[0] == 0:
        raise ValueError(f"centers: expected at least one class, got shape {_shape(centers)}")
    return centers.shape[0]


def check_loss(input: Tensor, classifier: Classifier, target: object, options: LossOptions) -> Tensor:
    """Check the arguments of a loss besides those of the logits; return the target as int64.

    Raises:
        TypeError: target is not an int64 or int32 tensor, or an option has the wrong type.
        ValueError: a shape or device does not fit, or an option is out of its range.
        IndexError: on the CPU, in eager mode, a target is out of range.
    """
    classes = check_some_classes(classifier.centers)
    ignore_index = options.ignore_index
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a torch.Tensor, got {type(target).__name__}")
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"target: expected int64 or int32 classes, got {target.dtype}"
            + (
                "; for class probabilities use F.cross_entropy of the logits"
                if target.is_floating_point()
                else ""
            )
        )
    if target.shape != input.shape[:1]:
        raise ValueError(f"target: expected shape [{input.shape[0]}], got {_shape(target)}")
    if target.device != input.device:
        raise ValueError(f"target: expected device {input.device} to match input, got {target.device}")
    for name, value, choices in (
        ("margin_kind", options.margin_kind, ("logit", "cosine", "angle")),
        ("reduction", options.reduction, ("mean", "sum", "none")),
    ):
        if value not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, Integral):
        raise TypeError(f"ignore_index: expected an integer, got {ignore_index!r}")
    if not 0.0 <= options.label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected 0 to 1, got {options.label_smoothing}")
    has_data = not (torch.compiler.is_compiling() or is_wrapped(target))
    if target.device.type == "cpu" and type(target) is Tensor and has_data:
        outside = (target != ignore_index) & ((target < 0) | (target >= classes))
        if outside.any():
            position = int(outside.nonzero()[0])
            raise IndexError(
                f"target: expected 0 to {classes - 1} or ignore_index {ignore_index}, "
                f"got {int(target[position])} at position {position}"
            )
    for name, value in (("class_bias", options.class_bias), ("weight", options.weight)):
        if value is not None:
            check_class_vector(name, value, classes, input)
    if options.weight is not None and options.weight.requires_grad:
        raise ValueError("weight: expected a tensor that needs no gradient; call .detach() first")
    if isinstance(options.margin, Tensor) and options.margin.dim() > 0:
        check_class_vector("margin", options.margin, classes, input)
    return target.long()


def _check_transform(transform: str, axis: object, mlp: object, input: Tensor) -> None:
    if transform not in ("translation", "rotation", "mlp"):
        raise ValueError(f"transform: expected 'translation', 'rotation' or 'mlp', got {transform!r}")
    if transform != "rotation" and axis is not None:
        raise ValueError("axis: expected None unless transform='rotation'")
    if transform != "mlp" and mlp is not None:
        raise ValueError("mlp: expected None unless transform='mlp'")
    d = input.shape[1]
    if transform == "rotation":
        axis = _floating("axis", axis)
        if axis.shape != (d,):
            raise ValueError(f"axis: expected shape [{d}] to match input, got {_shape(axis)}")
        if axis.device != input.device:
            raise ValueError(f"axis: expected device {input.device} to match input, got {axis.device}")
    if transform == "mlp":
        if not isinstance(mlp, tuple) or len(mlp) != 2:
            raise TypeError(f"mlp: expected a tuple of two tensors, got {type(mlp).__name__}")
        first, second = _floating("mlp[0]", mlp[0]), _floating("mlp[1]", mlp[1])
        if first.dim() != 2 or first.shape[0] < 1 or first.shape[1] != 2 * d:
            raise ValueError(f"mlp[0]: expected shape [h, {2 * d}] with h >= 1, got {_shape(first)}")
        if second.shape != (d, first.shape[0]):
            raise ValueError(f"mlp[1]: expected shape [{d}, {first.shape[0]}], got {_shape(second)}")
        for i, value in enumerate(mlp):
            if value.device != input.device:
                raise ValueError(
                    f"mlp[{i}]: expected device {input.device} to match input, got {value.device}"
                )


def check_integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """Return `value` as an int.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is below `low` or above `high`.
    """
    expected = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected {expected}, got {value!r} of type {type(value).__name__}")
    number = int(value)
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name}: expected {expected}, got {number}")
    return number


def check_positive(name: str, value: object) -> float:
    """Return `value` as a float.

    Raises:
        TypeError: `value` is not a real number.
        ValueError: `value` is not finite or not above 0.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number above 0, got {value!r} of type {type(value).__name__}")
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name}: expected a finite number above 0, got {number}")
    return number
