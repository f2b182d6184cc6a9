"""Networks of timm in tests, and images for them."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch

#: Of torchvision's C++ ops, those that its import describes to PyTorch. timm and peft do not call them.
DETECTION_OPS = ("nms", "qnms")
_library: list[torch.library.Library] = []  # a registration ends with its library


def import_or_skip(name: str) -> ModuleType:
    """Import a package that imports torchvision; skip the test if it is not installed.

    torchvision's wheels are built for PyTorch with CUDA. Beside a PyTorch for CPUs alone its C++ ops cannot be loaded, and its import
    fails at the first one that is missing. Their schemas are then declared, so that the rest of torchvision can be imported.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError:
        for module in [module for module in sys.modules if module.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        _library.append(torch.library.Library("torchvision", "FRAGMENT"))
        for op in DETECTION_OPS:
            _library[-1].define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip(name, reason=f"{name} is not installed")
