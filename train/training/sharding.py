"""--shard-classes: the head sharded over the processes, everything before the head replicated by DistributedDataParallel."""

from __future__ import annotations

import torch
from torch import nn

from gistops._dtensor import is_dtensor
from gistops.nn import MaxCosineHead

from .. import distributed
from ..config import Config
from ..methods.method import Method
from ..model.model import HeadMaker


def head_maker(method: Method, config: Config, device: torch.device) -> HeadMaker:
    """Return the method's `make_head`; with --shard-classes, for heads that no process ever holds whole.

    The values of such a head do not depend on the number of processes.
    """
    if not config.runtime.shard_classes:
        return method.make_head

    def make_head(in_features: int, num_classes: int) -> nn.Module:
        # Imported here because it takes a second, also for --help.
        from torch.distributed.device_mesh import init_device_mesh

        from gistops.distributed import shard_classes

        with torch.device("meta"):
            head = method.make_head(in_features, num_classes)
        processes = distributed.world_size()
        mesh = init_device_mesh(device.type, (processes,)) if processes > 1 else None
        assert isinstance(head, MaxCosineHead)
        return shard_classes(head, mesh, seed=config.run.seed)

    return make_head


def data_parallel(module: nn.Module) -> nn.Module:
    """Return a module in DistributedDataParallel, which also broadcasts the weights of rank 0.

    A sharded head synchronizes its gradients itself: those of the mean over the processes, as DistributedDataParallel's. Without
    several processes, or without other parameters to train, the module is returned as it is.
    """
    if not distributed.is_initialized():
        return module
    own = {name for name, parameter in module.named_parameters() if is_dtensor(parameter)}
    if own and not any(p.requires_grad and name not in own for name, p in module.named_parameters()):
        return module
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, own)
    return nn.parallel.DistributedDataParallel(module)
