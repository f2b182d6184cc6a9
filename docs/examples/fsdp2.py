"""A backbone of FSDP2 beside a head whose classes are divided between the same processes, with a checkpoint.

Run by `torchrun --nproc-per-node=2`: with gloo on the CPU, with NCCL on GPUs. Takes a few seconds.
"""

import os
import tempfile
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gistops.distributed import load_checkpoint, save_checkpoint, shard_classes
from gistops.nn import ConstellationClassifier

on_gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
if on_gpu:
    torch.cuda.set_device(device)
dist.init_process_group()
rank, processes = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh(device.type, (processes,))

classes, features = 1_000, 32
torch.manual_seed(0)  # the same means and backbone in all processes
means = torch.randn(classes, 16, device=device)
backbone = nn.Sequential(
    nn.Sequential(nn.Linear(16, 128), nn.GELU()), nn.Sequential(nn.Linear(128, features))
).to(device)
for block in backbone:
    fully_shard(block, mesh=mesh)  # the parameters of a block are gathered while it runs
fully_shard(backbone, mesh=mesh)

# The head is drawn shard by shard. It synchronizes its own gradients, so it stays outside fully_shard.
head = ConstellationClassifier(features, classes, num_displacements=4, device="meta")
head = shard_classes(head, mesh, seed=0)
model = nn.ModuleDict({"backbone": backbone, "head": head})

# FSDP2's parameters and the head's have different placements, so they are in different groups.
optimizer = torch.optim.AdamW(
    [{"params": [*backbone.parameters()]}, {"params": [*head.parameters()]}], lr=1e-2, weight_decay=0.01
)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this process's images and labels. Other ranks and steps have others."""
    generator = torch.Generator(device).manual_seed(step * processes + rank)
    labels = torch.randint(classes, (64,), generator=generator, device=device)
    noise = torch.randn(64, 16, generator=generator, device=device)
    return means[labels] + 0.3 * noise, labels


losses = []
for step in range(120):
    images, labels = batch(step)
    loss = head.loss(backbone(images), labels)  # of the joint batch
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

folder = [tempfile.mkdtemp() if rank == 0 else None]  # in a run: a folder that all processes share
dist.broadcast_object_list(folder)
save_checkpoint(folder[0], model, optimizer, extra={"step": 120})
images, labels = batch(1_000)
with torch.no_grad():
    before = head.predict(backbone(images))
    for parameter in model.parameters():
        parameter.zero_()
    assert load_checkpoint(folder[0], model, optimizer) == {"step": 120}
    assert torch.equal(head.predict(backbone(images)), before)
if rank == 0:
    correct = (before == labels).float().mean().item()
    print(f"{processes} processes: loss {losses[0]:.2f} to {losses[-1]:.2f}, {correct:.0%} of new samples")
    assert losses[-1] < 0.5 * losses[0]
    assert correct > 0.3
dist.destroy_process_group()
time.sleep(0.2)  # gloo's threads free their last tensors: if Python has ended, they abort the process
