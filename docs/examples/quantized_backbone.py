"""A backbone in int8 by torchao, in front of a frozen head. Takes a few seconds on a CPU. Needs `pip install torchao`."""

import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from gistops.nn import ConstellationClassifier

torch.manual_seed(0)
backbone = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128)).eval()
head = ConstellationClassifier(128, 1000, num_displacements=4).freeze()
x = torch.randn(32, 64)
with torch.no_grad():
    expected = head.predict_topk(backbone(x), 5)
    quantize_(
        backbone, Int8WeightOnlyConfig()
    )  # torchao replaces the weights of nn.Linear alone; a head stays as it is
    made = head.predict_topk(backbone(x), 5)
agreement = (made.classes[:, 0] == expected.classes[:, 0]).float().mean().item()
print(f"same first class: {agreement:.0%}")
assert agreement > 0.8
