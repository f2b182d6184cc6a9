"""Replacement of the classifier of a model, such as those of timm and torchvision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from .constellation import ConstellationClassifier
from .frozen import FrozenClassifier
from .head import MaxCosineHead
from .prediction import Predictor
from .two_heads import TwoHeadClassifier

Head = TypeVar("Head", bound=nn.Module)


def replace_classifier(
    model: nn.Module,
    num_classes: int,
    head: Callable[..., Head] = ConstellationClassifier,  # type: ignore[assignment]
    *,
    name: str | None = None,
    **options: Any,
) -> Head:
    """Put a new classifier in the place of a model's last layer, and return the new one.

    The model's `forward` then returns the logits of the new head. Models of timm name their classifier. In other models it
    is the last `nn.Linear` or head of gistops, also a frozen one, in the order of `named_modules()`, which fits the classifiers
    of torchvision. Layers inside `nn.MultiheadAttention` do not count. A layer that the model has under several names is replaced under
    all of them. Attributes `num_classes`, `num_labels` and `config.num_labels` of the model get the new number.

        model = timm.create_model("resnet50", pretrained=True)
        head = replace_classifier(model, 8142)  # model.fc is a ConstellationClassifier
        loss = head.loss(features, y)  # of the features before it, without logits
        replace_classifier(model, 1000, nn.Linear)  # and back

    Args:
        model: the model, which is changed in-place.
        num_classes: number of classes of the new head.
        head: called as `head(in_features, num_classes, device=…, dtype=…, **options)`: a head of `gistops.nn` or `nn.Linear`.
        name: name of the layer to replace, as in `named_modules()`, such as "fc" or "classifier.6".
        options: further arguments of `head`, such as `num_displacements=4`.

    Returns:
        The new head, a part of the model, on the device and in the dtype of the layer that it replaces.

    Raises:
        ValueError: there is no layer of this name, or no linear layer or head; the model itself is one; or the layer is of
            another kind.
    """
    place = _classifier_name(model) if name is None else name
    if not place:
        raise ValueError("model: expected a module that contains its classifier, got the classifier itself")
    try:
        old = model.get_submodule(place)
    except AttributeError as error:
        raise ValueError(
            f"name: expected the name of a layer of the model, got {place!r} ({error})"
        ) from None
    in_features: Any
    like: Tensor
    if isinstance(old, nn.Identity) and hasattr(
        model, "num_features"
    ):  # a model of timm without its classifier
        in_features = getattr(model, "head_hidden_size", None) or model.num_features
        like = next(model.parameters())
    elif isinstance(old, nn.LazyLinear):
        raise ValueError(
            f"name: expected a layer with known in_features as {place!r}, got LazyLinear; call the model once first"
        )
    elif isinstance(old, (nn.Linear, Predictor)):
        in_features, like = old.in_features, _first_weight(old)
    else:
        expected = "an nn.Linear or a head of gistops.nn"
        raise ValueError(f"name: expected {expected} as the layer {place!r}, got {type(old).__name__}")
    new = head(in_features, num_classes, device=like.device, dtype=like.dtype, **options)
    new.train(old.training)
    names = [place] if isinstance(old, nn.Identity) else _names(model, old)
    for parent, _, last in (n.rpartition(".") for n in names):
        setattr(model.get_submodule(parent), last, new)
    # transformers reshapes logits to these numbers where it computes a loss.
    for owner, attribute in (
        (model, "num_classes"),
        (model, "num_labels"),
        (getattr(model, "config", None), "num_labels"),
    ):
        if isinstance(getattr(owner, attribute, None), int):
            setattr(owner, attribute, num_classes)
    return new


def _classifier_name(model: nn.Module) -> str:
    """Return the name of a model's classifier.

    Raises:
        ValueError: the model has none, or several.
    """
    named: Any = getattr(model, "pretrained_cfg", None) or {}  # of timm
    named = dict(named).get("classifier")
    if isinstance(named, (tuple, list)):
        raise ValueError(f"name: expected one of the model's classifiers {', '.join(named)}, got none")
    if isinstance(named, str) and hasattr(model, "reset_classifier"):
        return str(named)
    layers: list[str] = []
    wholes: tuple[str, ...] = ()  # prefixes of layers inside of modules that use these themselves
    for place, layer in model.named_modules():
        if place.startswith(wholes):
            continue
        if isinstance(layer, (nn.Linear, Predictor)):
            layers.append(place)
        if isinstance(layer, (nn.MultiheadAttention, Predictor)):
            wholes += (f"{place}." if place else "",)
    if not layers:
        raise ValueError(
            f"model: expected one with an nn.Linear or a head, got {type(model).__name__}, which has none"
        )
    return layers[-1]


def _names(model: nn.Module, layer: nn.Module) -> list[str]:
    """Return all names of a layer in a model."""
    return [name for name, module in model.named_modules(remove_duplicate=False) if module is layer]


def _first_weight(layer: nn.Module) -> Tensor:
    """Return a tensor with the device and the dtype of a linear layer or a head."""
    if isinstance(layer, TwoHeadClassifier):
        layer = layer.balanced
    return layer.centers if isinstance(layer, (MaxCosineHead, FrozenClassifier)) else next(layer.parameters())
