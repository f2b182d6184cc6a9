"""Heads whose classes are divided between processes, on PyTorch's own engine: DTensor and torch.distributed."""

from .checkpoint import load_checkpoint, save_checkpoint
from .shard import shard_classes

__all__ = ["load_checkpoint", "save_checkpoint", "shard_classes"]
