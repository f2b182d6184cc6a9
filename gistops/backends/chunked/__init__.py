"""Ops in plain PyTorch over another backend's logits kernels, one chunk of classes at a time."""

from .ops import ChunkedOps

__all__ = ["ChunkedOps"]
