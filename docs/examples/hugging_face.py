"""A head in the Hugging Face Trainer, saved and loaded by `PyTorchModelHubMixin`. Takes a few seconds on a CPU.

Needs `pip install transformers accelerate`.
"""

import tempfile

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from transformers import Trainer, TrainingArguments

from gistops.nn import ConstellationClassifier


class Classifier(nn.Module, PyTorchModelHubMixin):
    """Returns what the Trainer asks for: the loss where labels are given, and logits."""

    def __init__(self, in_features: int, num_classes: int, num_displacements: int = 4) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(in_features, 64), nn.ReLU(), nn.Linear(64, 32))
        self.head = ConstellationClassifier(32, num_classes, num_displacements=num_displacements)

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        features = self.backbone(pixels)
        if labels is not None and self.training:
            return {"loss": self.head.loss(features, labels)}  # no logits in training
        outputs = {"logits": self.head(features)}
        return outputs if labels is None else {"loss": self.head.loss(features, labels)} | outputs


torch.manual_seed(0)
classes = 20
means = torch.randn(classes, 16)
labels = torch.arange(classes).repeat(20)
train = [{"pixels": means[k] + 0.5 * torch.randn(16), "labels": int(k)} for k in labels]
test = [{"pixels": means[k], "labels": k} for k in range(classes)]

model = Classifier(16, classes)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, num_train_epochs=20, per_device_train_batch_size=32, learning_rate=0.01, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=train)
    trainer.train()
    accuracy = (trainer.predict(test).predictions.argmax(-1) == range(classes)).mean()
    print(f"accuracy on the classes' means: {accuracy:.0%}")
    assert accuracy > 0.5

    model.save_pretrained(folder)  # push_to_hub uploads the same files
    loaded = Classifier.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(loaded(means)["logits"], model.eval()(means)["logits"])
