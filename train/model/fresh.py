"""The start of a network that is trained anew in the place of a trained one."""

from __future__ import annotations

import torch
from torch import nn

from .backbones import make_backbone
from .model import Model, Normalize


@torch.no_grad()
def reset_network(model: Model, pretrained: bool | str = False) -> None:
    """Give the backbone and the centering of a model new weights and statistics.

    The tensors are changed in place, because compiled functions hold the modules. New weights are drawn from torch's
    generator of the CPU.

    Args:
        model: the model.
        pretrained: start from the pretrained weights of timm, or from those in this file.
    """
    if isinstance(model.normalize, Normalize):
        fresh = make_backbone(model.backbone_name, len(model.normalize.mean), pretrained)
        model.backbone.load_state_dict(fresh.state_dict())
    if isinstance(model.center, nn.modules.batchnorm._BatchNorm):
        model.center.reset_running_stats()
