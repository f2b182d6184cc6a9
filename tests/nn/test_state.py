"""Tests of loading: a state dict is checked before any value changes, for heads and for frozen copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gistops.nn import ConstellationClassifier, GistClassifier

D, K, B = 24, 31, 6
TRANSFORMS = ["translation", "rotation", "mlp"]
FORMS: dict[str, Callable[[ConstellationClassifier], Any]] = {
    "head": lambda head: head,
    "frozen": lambda head: head.freeze(),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def make(m: int, transform: Any = "translation") -> ConstellationClassifier:
    return ConstellationClassifier(D, K, m, transform=transform)


def refuses(module: nn.Module, state: Any, words: str, **options: Any) -> None:
    """Check that a load fails with `words` and changes neither names nor values, nor draws random numbers."""
    model = nn.Sequential(module)
    before, random_state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(RuntimeError, match=words):
        model.load_state_dict({f"0.{name}": value for name, value in state.items()}, **options)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(torch.get_rng_state(), random_state)


@every_form
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (2, 5)], ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_any_number_of_displacements_loads_without_random_numbers(
    form: Any, transform: str, sizes: tuple[int, int], assign: bool, seed: int
) -> None:
    module, source, x = form(make(sizes[0], transform)), make(sizes[1], transform), torch.randn(B, D)
    random_state = torch.get_rng_state()
    module.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert module.state_dict().keys() == source.state_dict().keys()
    assert torch.equal(module(x), source(x))
    assert torch.equal(module.predict(x), source.predict(x))
    assert isinstance(module, ConstellationClassifier) or not list(module.parameters())


@every_form
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (2, 5)], ids=str)
@pytest.mark.parametrize("strict", [True, False])
def test_another_number_of_classes_changes_nothing(
    form: Any, sizes: tuple[int, int], strict: bool, seed: int
) -> None:
    state = ConstellationClassifier(D, K + 1, sizes[1], transform="rotation").state_dict()
    words = rf"size mismatch for 0\.centers: expected \[{K}, {D}\], got \[{K + 1}, {D}\]"
    refuses(form(make(sizes[0], "rotation")), state, words, strict=strict)


@every_form
@pytest.mark.parametrize("m", [0, 3])
@pytest.mark.parametrize("own", TRANSFORMS)
@pytest.mark.parametrize("other", TRANSFORMS[1:])
def test_displacements_of_another_transform_are_refused(
    form: Any, m: int, own: str, other: str, seed: int
) -> None:
    if own != other:
        words = rf"0\.displacements: expected those of a {own}, got those of a {other}"
        refuses(form(make(m, own)), make(3, other).state_dict(), words, strict=False)


BAD: list[tuple[str, Callable[[Tensor], object], str]] = [
    ("centers", lambda x: x.cpu().numpy(), r"0\.centers: expected a torch\.Tensor, got ndarray"),
    ("displacements", lambda x: x.tolist(), r"0\.displacements: expected a torch\.Tensor, got list"),
    ("displacements", lambda x: x.new_ones(256, D), r"0\.displacements: expected at most 255 .* \[256, 24\]"),
    ("raw_tau", lambda x: 3.0, r"0\.raw_tau: expected a torch\.Tensor, got float"),
]


@every_form
@pytest.mark.parametrize(("name", "change", "words"), BAD, ids=range(len(BAD)))
def test_a_wrong_value_is_named(
    form: Any, name: str, change: Callable[[Tensor], object], words: str, seed: int
) -> None:
    state: dict[str, Any] = make(5).state_dict()
    state[name] = change(state[name])
    refuses(form(make(2)), state, words)


@every_form
@pytest.mark.parametrize("strict", [True, False])
def test_rotations_without_their_axis_are_refused(form: Any, strict: bool, seed: int) -> None:
    state = make(4, "rotation").state_dict()
    del state["axis"]
    refuses(form(make(0, "rotation")), state, r"0\.axis: expected a torch\.Tensor besides", strict=strict)


@every_form
def test_integers_are_not_assigned(form: Any, seed: int) -> None:
    state = {name: value.long() for name, value in make(4).state_dict().items()}
    refuses(form(make(3)), state, r"0\.centers: expected float32, .* torch\.int64", assign=True)


@every_form
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("sizes", [(0, 2), (3, 2)], ids=str)
def test_a_part_of_a_state_dict_loads_if_not_strict(
    form: Any, transform: str, sizes: tuple[int, int], seed: int
) -> None:
    module, x = form(make(sizes[0], transform)), torch.randn(B, D)
    source = GistClassifier(D, K, sizes[1], transform=transform)  # type: ignore[arg-type]
    state = source.state_dict()
    module.load_state_dict(state, strict=False)
    assert torch.equal(module(x), source(x))
    with torch.no_grad():
        source.centers.copy_(source.centers.flip(0))
    module.load_state_dict({"centers": source.centers}, strict=False)
    assert torch.equal(module(x), source(x))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*random_centers"):
        module.load_state_dict(state)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("sizes", [(0, 3), (2, 5)], ids=str)
def test_a_head_that_is_not_trained_stays_so(transform: str, sizes: tuple[int, int], seed: int) -> None:
    head = make(sizes[0], transform).requires_grad_(False)
    head.load_state_dict(make(sizes[1], transform).state_dict())
    assert head.num_displacements == sizes[1]
    assert not any(p.requires_grad for p in head.parameters())
    partly = make(sizes[0], transform)
    partly.centers.requires_grad_(False)
    partly.load_state_dict(make(sizes[1], transform).state_dict())
    assert partly.displacements.requires_grad


def test_a_hook_may_still_change_the_entries(seed: int) -> None:
    def crop(module: nn.Module, state_dict: dict[str, Tensor], *_: Any) -> None:
        state_dict["centers"] = state_dict["centers"][:K]

    head, source = make(2), ConstellationClassifier(D, K + 1, 2)
    head.register_load_state_dict_pre_hook(crop)
    head.load_state_dict(source.state_dict())
    assert torch.equal(head.centers, source.centers[:K])
