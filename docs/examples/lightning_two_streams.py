"""GistNet in Lightning: the two streams are a `CombinedLoader`. Takes a few seconds on a CPU. Needs `pip install lightning`."""

import lightning as L
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gistops.nn import GistClassifier
from gistops.sampling import ClassBalancedBatchSampler


class GistNet(L.LightningModule):
    def __init__(self, in_features: int, classes: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(in_features, 64), nn.ReLU(), nn.Linear(64, 32))
        self.head = GistClassifier(32, classes, num_displacements=4)

    def training_step(self, batch, batch_idx):
        (x_balanced, y_balanced), (x_random, y_random) = batch["balanced"], batch["random"]
        both = self.backbone(torch.cat([x_balanced, x_random]))
        balanced, random = both.split([len(x_balanced), len(x_random)])
        loss_balanced, loss_random = self.head.losses(balanced, y_balanced, random, y_random)
        self.log_dict({"balanced": loss_balanced, "random": loss_random}, prog_bar=True)
        return loss_random + 0.5 * loss_balanced

    def predict_step(self, batch, batch_idx):
        return self.head.predict(self.backbone(batch[0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


L.seed_everything(0)
classes = 20
labels = torch.repeat_interleave(
    torch.arange(classes), torch.tensor([max(2, 200 // (k + 1)) for k in range(classes)])
)
means = torch.randn(classes, 16)
data = TensorDataset(means[labels] + 0.5 * torch.randn(len(labels), 16), labels)
balanced = DataLoader(
    data,
    batch_sampler=ClassBalancedBatchSampler(labels, classes_per_batch=8, samples_per_class=4, num_batches=40),
)
random = DataLoader(data, batch_size=32, shuffle=True, drop_last=True)

model = GistNet(16, classes)
# use_distributed_sampler=False: Lightning would replace the samplers in DDP, and the class-balanced one divides its batches
# between the ranks itself. Give the random stream a DistributedSampler of its own there.
trainer = L.Trainer(
    max_epochs=5, accelerator="cpu", use_distributed_sampler=False, logger=False, enable_checkpointing=False,
    enable_progress_bar=False,
)  # fmt: skip
trainer.fit(model, CombinedLoader({"balanced": balanced, "random": random}, mode="min_size"))
predictions = torch.cat(trainer.predict(model, DataLoader(TensorDataset(means), batch_size=8)))
accuracy = (predictions == torch.arange(classes)).float().mean().item()
print(f"accuracy on the classes' means: {accuracy:.0%}")
assert accuracy > 0.5
