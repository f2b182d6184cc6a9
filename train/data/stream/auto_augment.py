"""TrivialAugment and RandAugment by torchvision, with the random numbers of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: The random numbers that torchvision's transforms draw, and others that they may draw one day.
DRAWS = {torch.rand, torch.randint, torch.randn, torch.randperm, torch.bernoulli, torch.multinomial}
BITS = 24  # of a number by torch.rand


class AutoAugment:
    """A policy that augments images one by one, with the defaults of torchvision.

        trivial:  one operation per image, of random strength (Müller, Hutter, ICCV 2021, "wide")
        rand:     two operations per image, of strength 9 of 30 (Cubuk, Zoph, Shlens, Le, NeurIPS 2020)

    Raises:
        ImportError, RuntimeError: torchvision is not installed, or does not fit torch.
    """

    def __init__(self, policy: Literal["trivial", "rand"]) -> None:
        from torchvision.transforms import v2  # an optional extra

        self._transform: Callable[[Tensor], Tensor] = (
            v2.TrivialAugmentWide() if policy == "trivial" else v2.RandAugment()
        )

    def __call__(self, images: Tensor, seeds: list[int]) -> Tensor:
        """Return the augmented images, [b, c, h, w] uint8.

        Args:
            images: [b, c, h, w] uint8, or floating-point images from 0 to 255; c is 1 or 3.
            seeds: the seed of each image, on which its augmentation alone depends.
        """
        if images.is_floating_point():
            images = images.round().clamp(0, 255).to(torch.uint8)
        augmented = []
        for image, seed in zip(images, seeds, strict=True):
            with DrawFrom(torch.Generator().manual_seed(seed)):
                augmented.append(self._transform(image))
        return torch.stack(augmented)


class DrawFrom(TorchFunctionMode):
    """A context in which this thread's random numbers come from a generator.

    The transforms take none. torch's own generator would not do: other threads draw from it too.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        more = {"generator": self._generator} if func in DRAWS else {}
        return func(*args, **(kwargs or {}), **more)


def image_seeds(uniforms: Tensor) -> list[int]:
    """Return a seed for each image from two of its random numbers, [b, 2], on the CPU."""
    high, low = (uniforms.double() * 2**BITS).long().unbind(1)
    seeds: list[int] = (high * 2**BITS + low).tolist()
    return seeds
