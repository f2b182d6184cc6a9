"""Tests of FrozenClassifier: no way of changing weights leaves logits of old norms."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel

from gistops.nn import (
    ConstellationClassifier,
    FrozenClassifier,
    GistClassifier,
    MaxCosineHead,
    SubcenterClassifier,
)

from ..processes import in_group

D, K, B = 24, 67, 5
HEADS: dict[str, Callable[[], MaxCosineHead]] = {
    "constellation": lambda: ConstellationClassifier(D, K, 3),
    "no displacements": lambda: ConstellationClassifier(D, K, 0),
    "rotation": lambda: ConstellationClassifier(D, K, 3, transform="rotation"),
    "mlp": lambda: ConstellationClassifier(D, K, 3, transform="mlp"),
    "gist": lambda: GistClassifier(D, K, 3),
    "subcenters": lambda: SubcenterClassifier(D, K, 3),
}
every_head = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)


def add(head: nn.Module) -> None:
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.5)


def write_data(head: nn.Module) -> None:
    for parameter in head.parameters():
        parameter.data.copy_(parameter.data * 0.5 + 1)


def replace_data(head: nn.Module) -> None:
    for parameter in head.parameters():
        parameter.data = parameter.data + 0.5


def from_vector(head: nn.Module) -> None:
    if parameters := list(head.parameters()):
        vector_to_parameters(parameters_to_vector(parameters) + 0.5, parameters)


def write_memory(head: nn.Module) -> None:
    """Change the values through arrays that share their memory, which raises no version counter."""
    for parameter in head.parameters():
        if parameter.device.type == "cpu":
            parameter.detach().numpy()[...] += 0.5
        else:
            torch.from_dlpack(parameter.detach()).add_(0.5)


def assign(head: nn.Module) -> None:
    state = {name: value + 0.5 for name, value in head.state_dict().items()}
    head.load_state_dict(state, assign=True)


def load(head: nn.Module) -> None:
    head.load_state_dict({name: value + 0.5 for name, value in head.state_dict().items()})


CHANGES = [add, write_data, replace_data, from_vector, write_memory, assign, load]


def fresh_logits(head: MaxCosineHead, x: Tensor) -> Any:
    """Compute the logits of a new head with the same weights."""
    twin = copy.deepcopy(head)
    return twin(x)


@pytest.mark.parametrize("change", CHANGES)
@every_head
def test_a_change_of_the_head_reaches_the_head_and_not_the_frozen_copy(
    make: Callable[[], MaxCosineHead], change: Callable[[nn.Module], None], seed: int
) -> None:
    head, x = make(), torch.randn(B, D)
    before = head(x).detach()
    frozen = head.freeze()
    assert torch.equal(frozen(x), before)
    change(head)
    after = head(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh_logits(head, x))
    assert torch.equal(frozen(x), before)
    change(frozen)  # the frozen copy takes a state dict alone: logits are those of a head with these weights
    if change in (assign, load):
        twin = make()
        twin.load_state_dict(frozen.state_dict(), strict=False)
        assert torch.equal(frozen(x), twin(x))
        assert not torch.equal(frozen(x), before)
    else:
        assert torch.equal(frozen(x), before)


@pytest.mark.parametrize("kind", ["constellation", "subcenters"])
def test_compiled_copies_do_not_see_changes_and_compiled_heads_do(kind: str, seed: int) -> None:
    head, x = HEADS[kind](), torch.randn(B, D)
    frozen = head.freeze()
    compiled, compiled_frozen = (
        torch.compile(m, fullgraph=True, backend="aot_eager") for m in (head, frozen)
    )
    with torch.no_grad():
        before = compiled_frozen(x)
        assert torch.equal(before, compiled(x))
        for change in CHANGES[:3]:
            change(head)
            assert torch.equal(compiled(x), head(x))
            assert torch.equal(compiled_frozen(x), before)
        frozen.load_state_dict(head.state_dict())
        assert torch.equal(compiled_frozen(x), head(x))


@every_head
def test_casts_copies_and_pickles_have_their_own_norms(make: Callable[[], MaxCosineHead], seed: int) -> None:
    head, x = make(), torch.randn(B, D)
    frozen = head.freeze()
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    for twin in (copy.deepcopy(frozen), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), head(x))
        assert torch.equal(twin.bfloat16()(x), copy.deepcopy(head).bfloat16()(x))
        assert torch.equal(frozen(x), head(x))
    assert frozen.freeze() is frozen
    averaged = AveragedModel(frozen, use_buffers=True)
    averaged.update_parameters(HEADS["constellation"]().freeze())
    assert torch.equal(averaged(x), head(x))
    assert torch.equal(copy.deepcopy(frozen).double()(x), copy.deepcopy(head).double()(x))
    materialized = copy.deepcopy(frozen).to("meta").to_empty(device=torch.get_default_device())
    materialized.load_state_dict(frozen.state_dict())
    assert torch.equal(materialized(x), head(x))


@every_head
def test_a_model_with_a_frozen_head_saves_and_loads(make: Callable[[], MaxCosineHead], seed: int) -> None:
    x = torch.randn(B, D)
    model, other = (nn.Sequential(nn.Linear(D, D), make().freeze()) for _ in range(2))
    state = model.state_dict()
    with torch.no_grad():
        for value in state.values():
            value.add_(0.25)
    other.load_state_dict(state)
    features = other[0](x).detach()
    twin = make()
    twin.load_state_dict(other[1].state_dict(), strict=False)
    assert torch.equal(other[1](features), twin(features))
    with pytest.raises(RuntimeError, match=r"Missing key.*1\.centers"):
        other.load_state_dict({k: v for k, v in state.items() if k != "1.centers"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*1\.more"):
        other.load_state_dict({**state, "1.more": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"size mismatch for 1\.centers: expected"):
        other.load_state_dict({**state, "1.centers": state["1.centers"][1:]})
    assert torch.equal(other[1](features), twin(features)), "a refused state dict changes nothing"


@every_head
def test_freezing_under_inference_mode(make: Callable[[], MaxCosineHead], seed: int) -> None:
    head, x = make(), torch.randn(B, D)
    with torch.inference_mode():
        frozen = head.freeze()
        if isinstance(head, GistClassifier):
            exported = head.export()
            assert torch.equal(exported.freeze()(x), head(x))
            assert not exported.centers.is_inference()
        logits = frozen(x)
        assert torch.equal(frozen.double().float()(x), logits)
    assert torch.equal(frozen(x), head(x))
    x.requires_grad_()
    frozen(x).sum().backward()
    (expected,) = torch.autograd.grad(head(x).sum(), x)
    assert torch.equal(x.grad, expected)


def test_functional_call_does_not_replace_half_of_a_frozen_head(seed: int) -> None:
    head, x = HEADS["constellation"](), torch.randn(B, D)
    frozen, before = head.freeze(), head(x)
    changed = {name: p + 0.5 for name, p in head.named_parameters()}
    logits = torch.func.functional_call(head, changed, (x,))
    head.load_state_dict(changed)
    assert torch.equal(logits, head(x))
    for strict in (False, True):
        try:
            logits = torch.func.functional_call(frozen, changed, (x,), strict=strict)
        except (RuntimeError, AttributeError, KeyError):  # torch refuses names that a module does not have
            continue
        assert torch.equal(logits, before)


def test_a_frozen_head_follows_a_state_dict_with_more_displacements(seed: int) -> None:
    frozen, head, x = (
        ConstellationClassifier(D, K, 0).freeze(),
        ConstellationClassifier(D, K, 3),
        torch.randn(B, D),
    )
    frozen.load_state_dict(head.state_dict())
    assert frozen.num_displacements == 3
    assert torch.equal(frozen(x), head(x))
    assert isinstance(frozen, FrozenClassifier)
    assert "num_displacements=3" in repr(frozen)


@every_head
@pytest.mark.parametrize("options", [{}, {"full_state_dict": True, "cpu_offload": True}], ids=str)
def test_distributed_checkpoints_read_and_write_a_frozen_head(
    make: Callable[[], MaxCosineHead], options: dict[str, bool], seed: int
) -> None:
    model, other = (nn.Sequential(nn.Linear(D, D), make().freeze()) for _ in range(2))
    x = torch.randn(B, D)
    state = get_model_state_dict(model, options=StateDictOptions(**options))
    assert state.keys() == model.state_dict().keys()
    set_model_state_dict(other, state, options=StateDictOptions(**options))
    assert torch.equal(other(x), model(x))


def freeze_after_a_broadcast(rank: int) -> None:
    """Load a head from rank 0 and freeze it; a head that is frozen before is refused on the other ranks."""
    torch.manual_seed(rank)
    model, options = nn.Sequential(HEADS["constellation"]()), StateDictOptions(full_state_dict=True)
    options.broadcast_from_rank0 = True
    state = model.state_dict() if rank == 0 else {}
    set_model_state_dict(model, dict(state), options=options)
    logits = [torch.empty(B, K) for _ in range(2)]
    model[0] = model[0].freeze()
    dist.all_gather(logits, model(torch.ones(B, D)).contiguous())
    assert torch.equal(*logits)
    names = r"Missing key\(s\) in state_dict: \"0.centers\", \"0.displacements\", \"0.raw_tau\""
    with pytest.raises(RuntimeError, match=names) if rank else nullcontext():
        set_model_state_dict(model, dict(state), options=options)


@pytest.mark.cpu
def test_a_broadcast_reaches_the_head_before_it_is_frozen(tmp_path: Path) -> None:
    in_group(freeze_after_a_broadcast, 2, tmp_path)


@every_head
def test_the_weights_of_a_frozen_head_are_read_only(make: Callable[[], MaxCosineHead], seed: int) -> None:
    head, x = make(), torch.randn(B, D)
    frozen = head.freeze()
    before = frozen(x)
    for name, value in frozen.state_dict().items():
        read = getattr(frozen, name)
        assert torch.equal(read, value)
        assert torch.equal(read, head.get_parameter(name))
        assert not read.requires_grad
        read.zero_()
        with pytest.raises(AttributeError):
            setattr(frozen, name, read)
        with pytest.raises((AttributeError, KeyError)):
            setattr(frozen, name, nn.Parameter(read))
    assert torch.equal(frozen(x), before)
    assert not list(frozen.parameters())
    assert hasattr(frozen, "axis") == hasattr(head, "axis")


@every_head
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_inputs_of_another_dtype_give_the_bits_of_the_head(
    make: Callable[[], MaxCosineHead], dtype: torch.dtype, seed: int
) -> None:
    head, x = make(), torch.randn(64, D, dtype=dtype)
    frozen = head.freeze()
    logits, slots = frozen(x, return_slots=True)
    expected, expected_slots = head(x, return_slots=True)
    assert torch.equal(logits, expected)
    assert torch.equal(slots, expected_slots)
    for ours, true in zip(frozen.predict_topk(x, 5), head.predict_topk(x, 5), strict=True):
        assert torch.equal(ours, true)


@every_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_bits_of_the_head(
    make: Callable[[], MaxCosineHead], dtype: torch.dtype, seed: int
) -> None:
    head = make().to(dtype)
    frozen = head.freeze()
    for x in (torch.randn(64, D), torch.randn(64, D).bfloat16(), torch.randn(64, D, requires_grad=True)):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(frozen(x), head(x))
            with torch.no_grad():
                assert torch.equal(frozen(x), head(x))
                for ours, true in zip(frozen.predict_topk(x, 5), head.predict_topk(x, 5), strict=True):
                    assert torch.equal(ours, true)


def test_an_input_that_is_no_tensor_is_named() -> None:
    with pytest.raises(TypeError, match=r"^input: expected a torch.Tensor, got list"):
        HEADS["constellation"]().freeze()([[1.0] * D])
