"""Tests of heads that change their numbers of displacements and classes: state dicts, averages, initialization."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from gistops.nn import ConstellationClassifier, GistClassifier, MaxCosineHead, SlotUsage, SubcenterClassifier

D, K, B = 24, 31, 6
HEADS: dict[str, Callable[[int], MaxCosineHead]] = {
    "constellation": lambda m: ConstellationClassifier(D, K, m),
    "rotation": lambda m: ConstellationClassifier(D, K, m, transform="rotation"),
    "mlp": lambda m: ConstellationClassifier(D, K, m, transform="mlp"),
    "gist": lambda m: GistClassifier(D, K, m),
}
every_head = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)


@every_head
@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (2, 5), (5, 2)], ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_with_another_number_of_displacements_loads(
    make: Callable[[int], ConstellationClassifier], sizes: tuple[int, int], assign: bool, seed: int
) -> None:
    head, source, x = make(sizes[0]), make(sizes[1]), torch.randn(B, D)
    model = nn.Sequential(nn.Identity(), head)
    model.load_state_dict(nn.Sequential(nn.Identity(), source).state_dict(), assign=assign)
    assert head.num_displacements == sizes[1]
    assert torch.equal(head(x), source(x))
    assert {n: p.requires_grad for n, p in head.named_parameters()} == {
        n: p.requires_grad for n, p in source.named_parameters()
    }
    assert torch.equal(head.freeze()(x), source(x))
    if sizes[1]:
        head(x).sum().backward()
        assert head.displacements.grad is not None
    else:
        head.add_displacements(3)
        assert head.num_displacements == 3


def test_other_sizes_are_a_size_mismatch(seed: int) -> None:
    head = ConstellationClassifier(D, K, 0)
    for other, name in (
        (ConstellationClassifier(D + 1, K, 4), "displacements"),
        (ConstellationClassifier(D, K + 1, 4), "centers"),
    ):
        with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
            head.load_state_dict(other.state_dict())
    state = ConstellationClassifier(D, K, 4, transform="rotation").state_dict()
    del state["axis"]
    rotation = ConstellationClassifier(D, K, 0, transform="rotation")
    with pytest.raises(RuntimeError, match=r'Missing key.*"axis"'):
        rotation.load_state_dict(state)
    assert rotation.num_displacements == 0
    assert not hasattr(rotation, "axis")


@every_head
def test_an_average_follows_the_second_stage(
    make: Callable[[int], ConstellationClassifier], seed: int
) -> None:
    head, x = make(0), torch.randn(B, D)
    averaged = AveragedModel(head)
    averaged.update_parameters(head)
    head.add_displacements(4)
    averaged.module.load_state_dict(head.state_dict())
    averaged.update_parameters(head)
    torch.testing.assert_close(averaged(x), head(x))
    resumed = AveragedModel(make(0))
    resumed.load_state_dict(averaged.state_dict())
    assert torch.equal(resumed(x), averaged(x))


@pytest.mark.parametrize("kind", [ConstellationClassifier, GistClassifier, SubcenterClassifier])
def test_added_classes_are_those_of_a_new_head(kind: Callable[..., MaxCosineHead], seed: int) -> None:
    head, x = kind(256, K), torch.randn(B, 256)
    before, old = head(x).detach(), [p.detach().clone() for p in head.parameters()]
    usage = SlotUsage(head) if isinstance(head, ConstellationClassifier) else None
    head.add_classes(400)
    assert head.num_classes == K + 400
    assert f"num_classes={K + 400}" in repr(head)
    torch.testing.assert_close(
        head(x)[:, :K], before, atol=2e-5, rtol=1e-5
    )  # K decides the blocks of classes
    for parameter, values in zip(head.parameters(), old, strict=True):
        assert parameter.requires_grad
        assert torch.equal(parameter[: len(values)], values)
        if len(parameter) == K + 400:
            assert (
                abs(float(parameter[K:].detach().std()) * 16 - 1) < 0.05
            )  # std 1/16 from at least 102,400 numbers
    y = torch.full((B,), K + 399)
    head.loss(x, y).backward()
    assert head.centers.grad is not None
    if usage is not None:
        usage.update(x, y)
        assert usage.counts.sum() == B
    fresh = kind(256, K + 400)
    fresh.load_state_dict(head.state_dict())
    assert torch.equal(fresh(x), head(x))
    with pytest.raises(ValueError, match="num: expected an integer of at least 1, got 0"):
        head.add_classes(0)


PARAMETRIZATIONS: list[tuple[Callable[[nn.Module, str], object], str]] = [
    (
        parametrizations.weight_norm,
        r"the parametrization _WeightNorm; call .*remove_parametrizations\(head, '{}'\)",
    ),
    (parametrizations.spectral_norm, r"the parametrization _SpectralNorm; call .*remove_parametrizations"),
    (torch.nn.utils.spectral_norm, r"{}_orig; call .*remove_spectral_norm"),
    (lambda head, name: prune.l1_unstructured(head, name, 0.5), r"{}_orig; call .*prune\.remove"),
]


@pytest.mark.parametrize(("parametrize", "words"), PARAMETRIZATIONS)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (ConstellationClassifier, "centers"),
        (GistClassifier, "centers"),
        (GistClassifier, "random_centers"),
        (SubcenterClassifier, "centers"),
    ],
)
def test_classes_are_not_added_to_parametrized_centers(
    kind: Callable[..., MaxCosineHead],
    name: str,
    parametrize: Callable[[nn.Module, str], object],
    words: str,
    seed: int,
) -> None:
    head = kind(D, K)
    parametrize(head, name)
    state = {key: value.clone() for key, value in head.state_dict().items()}
    random_state = torch.get_rng_state()
    message = f"^add_classes: expected {name} to be a plain parameter, got {words.format(name)}"
    with pytest.raises(RuntimeError, match=message):
        head.add_classes(2)
    after = head.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], state[key]) for key in state)
    assert head.num_classes == K
    assert torch.equal(torch.get_rng_state(), random_state)


def test_classes_are_added_between_two_parametrizations(seed: int) -> None:
    head, x = GistClassifier(D, K), torch.randn(B, D)
    parametrizations.weight_norm(head, "centers")
    before = head(x).detach()
    torch.nn.utils.parametrize.remove_parametrizations(head, "centers")
    head.add_classes(2)
    parametrizations.weight_norm(head, "centers")
    torch.testing.assert_close(head(x)[:, :K], before)
    assert head.centers.shape == head.random_centers.shape == (K + 2, D)


def test_a_wrong_generator_is_named() -> None:
    words = "^generator: expected a torch.Generator or None, got int"
    for call in (ConstellationClassifier(D, K, 0).add_displacements, SubcenterClassifier(D, K).add_classes):
        with pytest.raises(TypeError, match=words):
            call(2, generator=3)


def test_slot_usage_follows_the_number_of_displacements(seed: int) -> None:
    head, x = ConstellationClassifier(D, K, 0), torch.randn(B, D)
    usage = SlotUsage(head)
    usage.update(x)
    head.add_displacements(4)
    usage.update(x)
    assert len(usage.counts) == 5
    assert usage.counts.sum() == 2 * B


@pytest.mark.parametrize(
    "make", [*(lambda make=make: make(3) for make in HEADS.values()), lambda: SubcenterClassifier(D, K)]
)
def test_reset_parameters_initializes_everything_after_to_empty(
    make: Callable[[], MaxCosineHead], seed: int
) -> None:
    with torch.device("meta"):
        head = make()
    head.to_empty(device=torch.get_default_device())
    with torch.no_grad():
        for tensor in [*head.parameters(), *head.buffers()]:
            tensor.fill_(torch.nan)  # uninitialized memory may hold anything
    torch.manual_seed(seed)
    head.reset_parameters()
    torch.manual_seed(seed)
    expected = make()
    for (name, ours), (_, true) in zip(head.state_dict().items(), expected.state_dict().items(), strict=True):
        assert ours.isfinite().all(), name
        assert ours.shape == true.shape
    torch.manual_seed(seed)
    expected.reset_parameters()
    x = torch.randn(B, D)
    assert torch.equal(head(x), expected(x))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (parametrizations.weight_norm, "centers"),
        (parametrizations.spectral_norm, "displacements"),
        (nn.utils.weight_norm, "random_centers"),
        (functools.partial(prune.l1_unstructured, amount=0.5), "mlp_in"),
    ],
)
def test_reset_parameters_names_a_parameter_that_it_cannot_write(change: Any, name: str) -> None:
    head = GistClassifier(6, 5, 2, transform="mlp")
    change(head, name)
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(RuntimeError, match=f"reset_parameters: expected {name} to be a plain parameter, got"):
        head.reset_parameters()
    assert all(torch.equal(value, before[key]) for key, value in head.state_dict().items())
