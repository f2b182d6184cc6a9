"""A mode that finds copies between devices without a GPU, which the meta device stands for."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class OneDevice(TorchDispatchMode):
    """A mode that refuses ops with tensors on two devices: a GPU's host waits for copies between them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs, made)) if isinstance(t, Tensor)}
        assert len(devices) <= 1, f"{func}: {devices}"
        return made
