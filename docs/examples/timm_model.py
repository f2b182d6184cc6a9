"""A model of timm whose classifier is a constellation. Takes half a minute on a CPU. Needs `pip install timm`."""

import timm
import torch

from gistops.nn import replace_classifier

torch.manual_seed(0)
model = timm.create_model("resnet18", num_classes=10)  # pretrained=True loads weights
head = replace_classifier(model, 20, num_displacements=4)

images, labels = torch.randn(8, 3, 64, 64), torch.randint(20, (8,))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
losses = []
for _ in range(10):
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    loss = head.loss(
        features, labels
    )  # without logits; F.cross_entropy(model(images), labels) is the same loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < losses[0]

model.eval()
assert model(images).shape == (8, 20)
