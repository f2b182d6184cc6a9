"""Heads whose classes are divided between processes, on PyTorch's own engine: DTensor and torch.distributed."""

from .shard import shard_classes

__all__ = ["shard_classes"]
