"""The part of a backbone that is trained: all, none, normalization, the last layers, or low-rank updates (LoRA, by peft)."""

from __future__ import annotations

from torch import Tensor, nn

from ..options import ConfigError
from .backbones import BasicBlock, Timm

BASE = ".base_layer"  # peft's name of a linear layer beside its update
UPDATE = ".lora_"  # part of the names of the updates' parameters


def add_low_rank_updates(backbone: nn.Module, rank: int) -> None:
    """Put a low-rank update, which is zero at first, beside each linear layer of a backbone.

    Raises:
        ConfigError: peft is not installed, or the backbone has no linear layer.
    """
    linear = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ConfigError("tune", "a backbone with linear layers for lora, such as a transformer", "none")
    try:
        import peft
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another torch
        expected = "peft for lora, which `pip install '.[foundation]'` installs"
        raise ConfigError("tune", expected, error) from None
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=linear), backbone)


def merge_low_rank_updates(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's state with the low-rank updates added to the weights, and the names of a model without them."""
    from peft.tuners.lora import Linear

    merged = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            merged[f"{name}{BASE}.weight"] = state[f"{name}{BASE}.weight"] + module.get_delta_weight(
                "default"
            )
    return {name.replace(BASE, ""): tensor for name, tensor in merged.items() if UPDATE not in name}


def freeze_untuned(backbone: nn.Module, tune: str) -> None:
    """Turn the gradients off of all parameters that --tune does not name.

    Raises:
        ConfigError: the backbone has fewer layers than --tune names.
    """
    if tune == "all":
        return
    tuned = _tuned(backbone, tune)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(name in tuned)


def keep_frozen_statistics(backbone: nn.Module) -> None:
    """Put each part of a backbone whose parameters are all frozen into evaluation mode."""
    for module in backbone.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def _tuned(backbone: nn.Module, tune: str) -> set[str]:
    """Return the names of the parameters to train."""
    names = {name for name, _ in backbone.named_parameters()}
    if tune == "lora":
        return {name for name in names if UPDATE in name}
    if tune == "norm":
        norms = (name for name, module in backbone.named_modules() if "Norm" in type(module).__name__)
        modules = set(norms)
        return {name for name in names if name.rpartition(".")[0] in modules}
    if tune == "head":
        return set()
    count = int(tune.removeprefix("last-"))
    layers = layer_numbers(backbone)
    last = max(layers.values())
    if count > last:
        raise ConfigError(
            "tune", f"last-N with N at most {last}, the backbone's layers after the first", repr(tune)
        )
    return {name for name, layer in layers.items() if layer > last - count}


def layer_numbers(backbone: nn.Module) -> dict[str, int]:
    """Return the layer of each parameter by its name: 0 for the first convolution or the embedding, then timm's layers or blocks."""
    if isinstance(backbone, Timm):
        from timm.models import group_parameters

        network = backbone.network
        found: dict[str, int] = group_parameters(network, network.group_matcher(coarse=False), reverse=True)
        return {f"network.{name}": layer for name, layer in found.items()}
    blocks = [name for name, module in backbone.named_modules() if isinstance(module, BasicBlock)]
    return {
        name: next((i + 1 for i, block in enumerate(blocks) if name.startswith(f"{block}.")), 0)
        for name, _ in backbone.named_parameters()
    }
