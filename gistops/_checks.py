"""Argument checks of the public functions. Every message names the argument, what was expected and what came."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ._classifier import Classifier, LossOptions, MarginKind, no_displacements
from ._dtensor import FSDP, is_dtensor
from ._functorch import transforms_active
from ._numbers import LARGEST, SMALLEST, check_integer, check_number, is_traced_scalar

MAX_SLOTS = 256  # slots are stored as uint8
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PI = 3.1415928  # π, rounded up so that π in float32 is within
MARGIN_KINDS, REDUCTIONS = get_args(MarginKind), ("mean", "sum", "none")
_PLAIN = (Tensor, torch.nn.Parameter)


def _floating(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if is_dtensor(value):
        raise TypeError(
            f"{name}: expected a local torch.Tensor, got a DTensor; call .to_local() or .full_tensor() first. A loss and a "
            "top-k take centers that shard_classes has divided; their logits would be a matrix over all classes. "
            + FSDP
        )
    if value.is_nested:  # its layout may be strided
        raise TypeError(
            f"{name}: expected a dense tensor, got a nested one; pass its rows, such as .values()"
        )
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {value.dtype}")
    return value


def _readable(value: Tensor) -> bool:
    """Return True if values can be read: in eager mode on the CPU, where nothing waits for a device and no graph breaks."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and type(value) in _PLAIN
        and value.device.type == "cpu"
        and not is_in_torch_dispatch_mode()
        and not transforms_active()
    )


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
    if input.dim() == 0 or input.shape[-1] == 0:
        raise ValueError(f"input: expected shape [..., d] with d >= 1, got {_shape(input)}")
    d = input.shape[-1]
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
    if input.dim() == 0 or input.shape[-1] == 0:
        raise ValueError(f"input: expected shape [..., d] with d >= 1, got {_shape(input)}")
    if centers.dim() != 3 or centers.shape[2] != input.shape[-1]:
        raise ValueError(
            f"centers: expected shape [K, M, {input.shape[-1]}] to match input's last dimension, "
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
    if is_traced_scalar(tau):
        tau = torch.as_tensor(tau).to(input.device, classifier.compute_dtype(input))
    if not isinstance(tau, Tensor):
        number = check_number("tau", tau, "a tensor of one element or a finite number above 0", SMALLEST)
        return classifier._replace(tau=on_device(number, classifier.compute_dtype(input), input.device))
    tau = _floating("tau", tau)
    if tau.numel() != 1:
        raise ValueError(f"tau: expected a tensor of one element, got shape {_shape(tau)}")
    if tau.device != input.device:
        raise ValueError(f"tau: expected device {input.device} to match input, got {tau.device}")
    if _readable(tau) and tau.item() <= 0:
        raise ValueError(f"tau: expected a value above 0, got {tau.item()}")
    return classifier._replace(tau=tau)


def on_device(number: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a number as a tensor filled on its device: a copy from the host would wait and break a CUDA graph."""
    if torch.compiler.is_compiling():  # `full` would make each value of the number a graph of its own
        return torch.ones((), dtype=dtype, device=device) * number
    if (
        abs(number) > torch.finfo(dtype).max
    ):  # as products of tensors with such numbers do; `full` would raise
        number = math.copysign(math.inf, number)
    return torch.full((), number, dtype=dtype, device=device)


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


def check_loss(
    input: Tensor,
    classifier: Classifier,
    target: object,
    options: LossOptions,
    all_classes: int | None = None,
) -> tuple[Tensor, LossOptions]:
    """Check the arguments of a loss besides those of the logits; return target, and options with plain numbers.

    Args:
        all_classes: the number of classes of all processes, if the classifier has a part of them.

    Raises:
        TypeError: target is not an int64 or int32 tensor, or an option has the wrong type.
        ValueError: a shape or device does not fit, or an option is out of its range.
        IndexError: on the CPU, in eager mode, a target is out of range.
    """
    classes = classifier.centers.shape[0] if all_classes else check_some_classes(classifier.centers)
    for name, choice, choices in (
        ("margin_kind", options.margin_kind, MARGIN_KINDS),
        ("reduction", options.reduction, REDUCTIONS),
    ):
        if not isinstance(choice, str) or choice not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {choice!r}")
    options = options._replace(
        ignore_index=check_integer("ignore_index", options.ignore_index, -(2**63), 2**63 - 1),
        label_smoothing=check_number(
            "label_smoothing", options.label_smoothing, "a number from 0 to 1", 0.0, 1.0
        ),
        margin=_margin(options, classes, input),
    )
    _check_sampling(options, input)
    for name, value in (("class_bias", options.class_bias), ("weight", options.weight)):
        if value is not None:
            check_class_vector(name, value, classes, input)
    weight = options.weight
    if weight is not None:
        if weight.requires_grad:
            raise ValueError("weight: expected a tensor that needs no gradient; call .detach() first")
        if _readable(weight) and (weight < 0).any():
            raise ValueError(
                f"weight: expected no negative value, got {weight.min().item()} at class {int(weight.argmin())}"
            )
    return _target(target, options.ignore_index, all_classes or classes, input), options


def _check_sampling(options: LossOptions, input: Tensor) -> None:
    share, generator = options.sample_negatives, options.generator
    if share is None:
        if generator is not None:
            raise ValueError("generator: expected None without sample_negatives")
        return
    check_number("sample_negatives", share, "a number above 0, up to 1", SMALLEST, 1.0)
    if options.label_smoothing > 0:
        raise ValueError(
            f"label_smoothing: expected 0 with sample_negatives, got {options.label_smoothing}: the logits of classes that "
            "are not drawn are unknown"
        )
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
    if generator is not None and generator.device != input.device:
        raise ValueError(f"generator: expected device {input.device} to match input, got {generator.device}")


def _margin(options: LossOptions, classes: int, input: Tensor) -> Tensor | float | None:
    margin, angle = options.margin, options.margin_kind == "angle"
    if margin is None:
        return None
    if is_traced_scalar(margin):
        margin = torch.as_tensor(margin).to(input.device, torch.promote_types(input.dtype, torch.float32))
    low, high = (0.0, PI) if angle else (-LARGEST, LARGEST)
    if not isinstance(margin, Tensor):
        number = "a number from 0 to π" if angle else "a finite number"
        return check_number("margin", margin, f"a tensor or {number}", low, high)
    margin = _floating("margin", margin)
    if margin.dim() > 0:
        return _angles(check_class_vector("margin", margin, classes, input), angle)
    if margin.device != input.device:
        raise ValueError(f"margin: expected device {input.device} to match input, got {margin.device}")
    return _angles(margin, angle)


def _angles(margin: Tensor, angle: bool) -> Tensor:
    if angle and margin.numel() and _readable(margin):
        low, high = (x.item() for x in margin.aminmax())
        if low < 0 or high > PI:
            raise ValueError(f"margin: expected angles from 0 to π, got {low if low < 0 else high}")
    return margin


def _target(target: object, ignore_index: int, classes: int, input: Tensor) -> Tensor:
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a torch.Tensor, got {type(target).__name__}")
    if target.dtype not in (torch.int64, torch.int32):
        probabilities = "; for class probabilities use F.cross_entropy of the logits"
        raise TypeError(
            f"target: expected int64 or int32 classes, got {target.dtype}"
            + (probabilities if target.is_floating_point() else "")
        )
    if target.shape != input.shape[:-1]:
        raise ValueError(f"target: expected shape {list(input.shape[:-1])}, got {_shape(target)}")
    if target.device != input.device:
        raise ValueError(f"target: expected device {input.device} to match input, got {target.device}")
    if _readable(target) and not _all_within(target, classes):
        outside = (target.long() != ignore_index) & ((target < 0) | (target >= classes))
        refuse_classes("target", target, outside, f"0 to {classes - 1} or ignore_index {ignore_index}")
    return target


def refuse_classes(name: str, classes: Tensor, outside: Tensor, expected: str) -> None:
    """Raise an IndexError that names the first class where `outside` is True, if there is one."""
    if outside.any():
        position = tuple(outside.nonzero()[0].tolist())
        where = ", ".join(map(str, position)) or 0
        raise IndexError(f"{name}: expected {expected}, got {int(classes[position])} at position {where}")


def _all_within(target: Tensor, classes: int) -> bool:
    """Return True if all targets are from 0 to classes - 1. One op finds it, where the whole check takes seven."""
    if target.numel() == 0:
        return True
    low, high = target.aminmax()
    return bool(low.item() >= 0 and high.item() < classes)


def _check_transform(transform: str, axis: object, mlp: object, input: Tensor) -> None:
    if transform not in ("translation", "rotation", "mlp"):
        raise ValueError(f"transform: expected 'translation', 'rotation' or 'mlp', got {transform!r}")
    if transform != "rotation" and axis is not None:
        raise ValueError("axis: expected None unless transform='rotation'")
    if transform != "mlp" and mlp is not None:
        raise ValueError("mlp: expected None unless transform='mlp'")
    d = input.shape[-1]
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
