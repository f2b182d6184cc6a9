"""Backbones: residual networks (He et al., CVPR 2016) with torchvision's parameter names, and those of timm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ZeroPadShortcut(nn.Module):
    """Option A of He et al.: subsample, and pad the new channels with zeros."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.stride, self.new_planes = stride, planes - in_planes

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_planes))


def projection_shortcut(in_planes: int, planes: int, stride: int) -> nn.Module:
    """Return option B of He et al.: a 1×1 convolution."""
    return nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut; `make_shortcut` makes it where the shape changes."""

    def __init__(
        self, in_planes: int, planes: int, stride: int, make_shortcut: Callable[[int, int, int], nn.Module]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or in_planes != planes:
            self.downsample = make_shortcut(in_planes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class SmallResNet(nn.Module):
    """Three stages of basic blocks at full, half and quarter resolution, then global average pooling: [b, d]."""

    def __init__(self, in_channels: int, blocks: int, width: int, stem_stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._layer(width, width, blocks, stride=1)
        self.layer2 = self._layer(width, 2 * width, blocks, stride=2)
        self.layer3 = self._layer(2 * width, 4 * width, blocks, stride=2)
        self.out_features = 4 * width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _layer(in_planes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_planes, planes, stride, ZeroPadShortcut)
        return nn.Sequential(
            first, *(BasicBlock(planes, planes, 1, ZeroPadShortcut) for _ in range(blocks - 1))
        )

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        features: Tensor = x.mean((2, 3))
        return features


class ResNet10(nn.Module):
    """One basic block per stage in four stages on ImageNet's stem, for 224×224: [b, 512]. The usual one for ImageNet-LT."""

    out_features = 512

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        planes = (64, 64, 128, 256, 512)
        for i in range(1, 5):
            block = BasicBlock(planes[i - 1], planes[i], 1 if i == 1 else 2, projection_shortcut)
            setattr(self, f"layer{i}", nn.Sequential(block))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, 2, padding=1)
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        features: Tensor = x.mean((2, 3))
        return features


class Timm(nn.Module):
    """A network of timm without its classifier.

    Args:
        name: its name in timm.
        in_channels: the channels of the images. timm adapts the weights of the first layer.
        pretrained: True for timm's weights, or the path of a file of weights with timm's names.
    """

    def __init__(self, name: str, in_channels: int, pretrained: bool | str) -> None:
        super().__init__()
        try:
            import timm  # type: ignore[import-not-found, unused-ignore]
        except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another torch
            raise BackboneError(f"timm, which `pip install timm` installs ({error})") from None
        overlay = {"file": pretrained} if isinstance(pretrained, str) else None

        def create() -> Any:
            return timm.create_model(
                name, bool(pretrained), pretrained_cfg_overlay=overlay, in_chans=in_channels, num_classes=0
            )

        expected = "the name of a network of timm"
        if pretrained:
            expected += f" whose weights can be loaded{f' from {pretrained}' if overlay else ''}"
        try:
            self.network: Any = create()
        except (
            Exception
        ) as error:  # unknown network, or its weights cannot be loaded: the type depends on the file
            why = str(error).partition("\n")[0] or type(error).__name__
            raise BackboneError(f"{expected} ({why})") from None
        if overlay and (drawn := self._drawn(create)):
            raise BackboneError(f"{expected} (it has no {drawn[0]}; {len(drawn)} tensors are missing)")
        self.out_features: int = self.network.num_features  # type: ignore[assignment, unused-ignore]

    def _drawn(self, create: Callable[[], Any]) -> list[str]:
        """Return the names of tensors that a file lacks: timm draws such weights, and such statistics remain zero."""
        with torch.random.fork_rng(devices=[]):
            again = create().named_parameters()
        pairs = zip(self.network.named_parameters(), again, strict=True)
        drawn = [name for (name, first), (_, second) in pairs if not torch.equal(first, second)]
        buffers = self.network.named_buffers()
        return drawn + [name for name, x in buffers if name.endswith("running_mean") and not x.any()]

    def mean_std(self, channels: int) -> tuple[Tensor, Tensor]:
        """Return the mean and standard deviation of the images that the weights were trained on, [channels] each.

        They are for pixels from 0 to 1. If the weights were trained with another number of channels, the values are
        averaged over those channels, as timm does with the weights of the first layer.
        """
        known = (torch.tensor(self.network.pretrained_cfg[name]) for name in ("mean", "std"))
        mean, std = (t if len(t) == channels else t.mean().expand(channels) for t in known)
        return mean, std

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images)
        return features


class BackboneError(ValueError):
    """A backbone is unavailable; the message says what was expected."""


TIMM = "timm/"


def make_backbone(name: str, in_channels: int, pretrained: bool | str = False) -> nn.Module:
    """Return a backbone by its name; it has the attribute `out_features`.

    Raises:
        BackboneError: timm is not installed, or has no such network.
    """
    if name.startswith(TIMM):
        return Timm(name.removeprefix(TIMM), in_channels, pretrained)
    return BACKBONES[name](in_channels)


#: Backbones by name; each takes the number of channels.
BACKBONES: dict[str, Callable[[int], nn.Module]] = {
    # One block per stage on a stem of stride 2, twice as wide: for 28×28 on a CPU.
    "resnet8-half": lambda channels: SmallResNet(channels, blocks=1, width=32, stem_stride=2),
    "resnet20": lambda channels: SmallResNet(channels, blocks=3, width=16),
    "resnet32": lambda channels: SmallResNet(channels, blocks=5, width=16),
    "resnet10": ResNet10,
}
