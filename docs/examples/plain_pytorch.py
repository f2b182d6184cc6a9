"""GistNet in a plain PyTorch loop: two streams, two stages, and inference. Takes a few seconds on a CPU."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gistops.nn import GistClassifier
from gistops.sampling import ClassBalancedBatchSampler

torch.manual_seed(0)
classes, features = 20, 32
sizes = [max(2, 200 // (k + 1)) for k in range(classes)]  # long-tailed
labels = torch.repeat_interleave(torch.arange(classes), torch.tensor(sizes))
means = torch.randn(classes, 16)
images = means[labels] + 0.5 * torch.randn(len(labels), 16)
data = TensorDataset(images, labels)

backbone = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, features))
head = GistClassifier(features, classes, num_displacements=0)
balanced = DataLoader(
    data,
    batch_sampler=ClassBalancedBatchSampler(labels, classes_per_batch=8, samples_per_class=4, num_batches=40),
)
random = DataLoader(data, batch_size=32, shuffle=True, drop_last=True)

for stage in (1, 2):
    if stage == 2:
        head.add_displacements(4)
    # The displacements of stage 2 are new parameters, so each stage has its own optimizer.
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
    for _ in range(5):
        for (x_balanced, y_balanced), (x_random, y_random) in zip(balanced, random, strict=False):
            features_of = backbone(torch.cat([x_balanced, x_random])).split([len(x_balanced), len(x_random)])
            loss_balanced, loss_random = head.losses(features_of[0], y_balanced, features_of[1], y_random)
            optimizer.zero_grad()
            (loss_random + 0.5 * loss_balanced).backward()
            optimizer.step()
    print(f"stage {stage}: loss {loss_random.item():.3f}")

inference = head.export().freeze()
with torch.no_grad():
    x = means + 0.5 * torch.randn(classes, 16)
    accuracy = (inference.predict(backbone(x)) == torch.arange(classes)).float().mean().item()
print(f"accuracy on new samples, one per class: {accuracy:.0%}")
assert accuracy > 0.5
