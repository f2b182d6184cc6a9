"""`replace_classifier` on small models, and on real ones of timm and torchvision where these are installed."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import nn

from gistops.nn import ConstellationClassifier, GistClassifier, SubcenterClassifier, replace_classifier


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 10
        self.fc = nn.Linear(6, 8)
        self.classifier = nn.Sequential(nn.ReLU(), nn.Linear(8, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.fc(x))


@pytest.mark.parametrize(
    ("head", "options"),
    [
        (ConstellationClassifier, {"num_displacements": 2}),
        (GistClassifier, {}),
        (SubcenterClassifier, {"num_subcenters": 2}),
    ],
)
def test_the_last_layer_is_replaced(head: type[nn.Module], options: dict[str, int]) -> None:
    model = Small().double().eval()
    new = replace_classifier(model, 7, head, **options)
    assert type(new) is head
    assert model.classifier[1] is new
    assert (model.num_classes, new.in_features, new.num_classes) == (7, 8, 7)
    assert next(new.parameters()).dtype == torch.float64
    assert not new.training
    x = torch.randn(5, 6, dtype=torch.float64)
    logits = model(x)
    assert logits.shape == (5, 7)
    torch.testing.assert_close(logits, new(model.classifier[0](model.fc(x))))
    logits.sum().backward()
    assert model.fc.weight.grad is not None


def test_back_to_a_linear_layer() -> None:
    model = Small()
    before = copy.deepcopy(model)
    replace_classifier(model, 7)
    linear = replace_classifier(model, 10, nn.Linear, bias=True)
    assert model.classifier[1] is linear
    model.load_state_dict(before.state_dict())
    x = torch.randn(5, 6)
    assert torch.equal(model(x), before(x))


def test_a_layer_by_name() -> None:
    model = Small()
    head = replace_classifier(model, 8, name="fc", num_displacements=0)
    assert model.fc is head
    assert head.in_features == 6


def test_mistakes() -> None:
    with pytest.raises(
        ValueError, match="model: expected a module that contains its classifier, got the classifier"
    ):
        replace_classifier(nn.Linear(3, 4), 5)
    with pytest.raises(
        ValueError, match=r"model: expected one with an nn\.Linear or a head, got Conv2d, which has none"
    ):
        replace_classifier(nn.Conv2d(3, 4, 1), 5)
    with pytest.raises(ValueError, match="name: expected the name of a layer of the model, got 'head'"):
        replace_classifier(Small(), 5, name="head")
    with pytest.raises(
        ValueError, match=r"name: expected an nn\.Linear or a head .* 'classifier\.0', got ReLU"
    ):
        replace_classifier(Small(), 5, name="classifier.0")


# torchvision beside a torch that it was not built for raises a RuntimeError, and timm imports torchvision.
def installed(package: str) -> bool:
    try:
        importlib.import_module(package)
    except (ImportError, RuntimeError):
        return False
    return True


@pytest.mark.skipif(
    not installed("timm"), reason="timm is not installed, or its torchvision does not fit this torch"
)
@pytest.mark.parametrize(
    "name",
    ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "efficientnet_b0", "swin_tiny_patch4_window7_224"],
)
def test_timm(name: str) -> None:
    import timm

    model = timm.create_model(name, num_classes=10).eval()
    head = replace_classifier(model, 7)
    assert model.get_classifier() is head
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        torch.testing.assert_close(model(x), head(features))
    model.reset_classifier(0)
    assert replace_classifier(model, 4).in_features == head.in_features


def test_a_model_of_transformers_computes_its_loss() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=3)).eval()
    replace_classifier(model, 7)
    target = torch.tensor([0, 6])
    output = model(input_ids=torch.ones(2, 4, dtype=torch.long), labels=target)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, target))
    assert (model.num_labels, model.config.num_labels) == (7, 7)


@pytest.mark.skipif(
    not installed("timm"), reason="timm is not installed, or its torchvision does not fit this torch"
)
def test_timm_with_two_classifiers_or_a_convolution() -> None:
    import timm

    with torch.device("meta"):
        distilled, convolution = (
            timm.create_model("deit_tiny_distilled_patch16_224"),
            timm.create_model("resnetv2_50"),
        )
    with pytest.raises(
        ValueError, match="name: expected one of the model's classifiers head, head_dist, got none"
    ):
        replace_classifier(distilled, 7)
    with pytest.raises(ValueError, match=r"the layer 'head\.fc', got Conv2d"):
        replace_classifier(convolution, 7)


@pytest.mark.skipif(
    not installed("torchvision"), reason="torchvision is not installed, or does not fit this torch"
)
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("resnet18", "fc"),
        ("vgg11", "classifier.6"),
        ("vit_b_16", "heads.head"),
        ("mobilenet_v3_small", "classifier.3"),
    ],
)
def test_torchvision(name: str, place: str) -> None:
    import torchvision

    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    head = replace_classifier(model, 7)
    assert model.get_submodule(place) is head
    assert head.centers.is_meta
    with torch.device("meta"):
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 7)


class TwoNames(nn.Module):
    """A model that has its classifier under two names, and calls the second."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(6, 8)
        self.parts = nn.ModuleList([self.classifier])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts[0](x)


@pytest.mark.parametrize("name", [None, "classifier", "parts.0"])
def test_a_layer_with_two_names(name: str | None) -> None:
    model = TwoNames()
    head = replace_classifier(model, 7, name=name)
    assert model.classifier is head
    x = torch.randn(5, 6)
    assert torch.equal(model(x), head(x))


def test_the_layer_inside_an_attention_stays() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(6, 8), "pool": nn.MultiheadAttention(6, 2)})
    head = replace_classifier(model, 7)
    assert model["fc"] is head
    assert type(model["pool"].out_proj) is not type(head)


@pytest.mark.parametrize("kind", ["frozen", "both", "both frozen"])
def test_a_head_for_inference_is_replaced(kind: str) -> None:
    gist = GistClassifier(8, 10, 2, dtype=torch.float64)
    old = gist.freeze() if kind == "frozen" else gist.export(heads="both")
    model = nn.Sequential(nn.Linear(6, 8).double(), old.freeze() if kind == "both frozen" else old)
    head = replace_classifier(model, 7)
    assert model[1] is head
    assert head.centers.dtype == torch.float64
    x = torch.randn(5, 6, dtype=torch.float64)
    assert torch.equal(model(x), head(model[0](x)))


def test_a_lazy_layer() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LazyLinear(10))
    with pytest.raises(
        ValueError,
        match="name: expected a layer with known in_features as '1', got LazyLinear; call the model",
    ):
        replace_classifier(model, 7)
    model(torch.randn(2, 6))
    assert replace_classifier(model, 7).in_features == 8
