"""The arguments of a call on sharded classes, checked and agreed on by all processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard

from ... import backends
from ..._checks import check_classifier
from ..._classifier import Classifier
from ..._dtensor import is_dtensor
from .collectives import INPUT, enter
from .shards import Batch, Shards

CLASSES = 1 << 30  # the bit in `Batch.needs` of gradients that stay with the classes


class Problem(NamedTuple):
    """The arguments of a call in this process."""

    input: Tensor  # the rows of this process, [B, d]
    shape: torch.Size  # of input without its last dimension
    replicated_input: bool
    classifier: Classifier  # the classes of this process
    backend: str
    more: Any  # other arguments of the call


def agreed(
    call: str,
    input: object,
    classifier: Classifier,
    backend: str | None,
    check: Callable[[Shards, Tensor, Classifier], tuple[dict[str, object], Any]],
) -> tuple[Shards, Batch, Problem]:
    """Check the arguments of a call in all processes.

    Args:
        call: the name of the call, which all processes must make.
        input, classifier, backend: as in the public functions; centers are a DTensor, others may be.
        check: checks the other arguments, given the local input and classifier; returns the facts that must be equal in all
            processes, and the arguments.

    Raises:
        Exception: the checks failed in this process.
        RuntimeError: they failed in another process.
        ValueError: the processes have different arguments.
    """
    shards = Shards.of(classifier.centers)  # type: ignore[arg-type]
    facts: dict[str, object] = {}
    problem, rows, needs, error = None, 0, 0, None
    try:
        problem, facts = _checked(shards, call, input, classifier, backend, check)
        rows, needs = len(problem.input), _needs(problem)
    except Exception as caught:
        error = caught
    batch = shards.agree(facts, rows, needs, error)
    assert problem is not None  # otherwise `agree` has raised
    return shards, batch, problem


def _checked(
    shards: Shards,
    call: str,
    input: Any,
    classifier: Classifier,
    backend: str | None,
    check: Callable[..., Any],
) -> tuple[Problem, dict[str, object]]:
    replicated_input = is_dtensor(input) and tuple(input.placements) == (Replicate(),)
    if is_dtensor(input):
        if input.device_mesh != shards.mesh:
            raise ValueError(
                f"input: expected the mesh of the centers, {shards.mesh}, got {input.device_mesh}"
            )
        if not replicated_input and tuple(input.placements) != (Shard(0),):
            raise TypeError(
                f"input: expected a DTensor with placement Shard(0) or Replicate(), got {input.placements}"
            )
        input = input.to_local()
    classifier = local_classifier(shards, classifier)
    if isinstance(input, Tensor) and input.device.type != shards.mesh.device_type:
        raise ValueError(
            f"input: expected device type {shards.mesh.device_type}, that of the mesh, got {input.device}"
        )
    classifier = check_classifier(input, classifier)
    chosen = backends.choose(input.device.type, backend)
    rows = input.reshape(-1, input.shape[-1])
    more, mine = check(shards, input, classifier)
    facts = {
        "call": call,
        "classes": shards.classes,
        "centers": (list(classifier.centers.shape[1:]), classifier.centers.dtype),
        "displacements": list(classifier.displacements.shape),
        "transform": classifier.transform,
        "input's dtype": input.dtype,
        "placement of input": "replicated" if replicated_input else "own rows",
        **({"number of rows": len(rows)} if replicated_input else {}),
        "backend": chosen,
        # The backward has collectives too.
        "gradients": "enabled" if torch.is_grad_enabled() else "disabled",
        "requires_grad of centers": torch.is_grad_enabled() and classifier.centers.requires_grad,
        **more,
    }
    return Problem(rows, input.shape[:-1], replicated_input, classifier, chosen, mine), facts


def local_classifier(shards: Shards, classifier: Classifier) -> Classifier:
    """Return the classifier of this process's classes.

    Raises:
        TypeError, ValueError: a placement, a mesh or a shape does not fit.
    """
    centers, displacements, tau, transform, axis, mlp = classifier
    part = shards.sharded("centers", centers)
    if len(part) != shards.stop - shards.start:
        raise ValueError(
            f"centers: expected {shards.stop - shards.start} classes on rank {shards.rank} of {shards.size}, as torch.chunk "
            f"divides {shards.classes}, got {len(part)}"
        )
    return Classifier(
        part,
        shards.replicated("displacements", displacements),
        shards.replicated("tau", tau),
        transform,
        shards.replicated("axis", axis),
        None if mlp is None else tuple(shards.replicated(f"mlp[{i}]", x) for i, x in enumerate(mlp)),
    )


def parameters_of(classifier: Classifier) -> list[Tensor]:
    """Return the parameters that all processes have."""
    _, displacements, tau, _, axis, mlp = classifier
    return [displacements, tau, *(() if axis is None else (axis,)), *(mlp or ())]


def with_parameters(classifier: Classifier, parameters: list[Tensor]) -> Classifier:
    """Return the classifier with the parameters in the order of `parameters_of`."""
    displacements, tau, *others = parameters
    classifier = classifier._replace(displacements=displacements, tau=tau)
    if classifier.axis is not None:
        classifier = classifier._replace(axis=others[0])
    if classifier.mlp is not None:
        classifier = classifier._replace(mlp=(others[0], others[1]))
    return classifier


def _needs(problem: Problem) -> int:
    """Return the bits of the gradients that this process needs."""
    if not torch.is_grad_enabled():
        return 0
    classifier, extra = problem.classifier, getattr(problem.more, "replicated", ())
    needs = INPUT if problem.input.requires_grad else 0
    for i, x in enumerate([*parameters_of(classifier), *extra]):
        needs |= (2 << i) if x.requires_grad else 0
    local = (classifier.centers, *getattr(problem.more, "sharded", ()))
    return needs | (CLASSES if any(x.requires_grad for x in local) else 0)


def enter_problem(
    shards: Shards, batch: Batch, problem: Problem, extra: tuple[Tensor, ...] = ()
) -> tuple[Tensor, Classifier, list[Tensor]]:
    """Return the rows of all processes, the classifier, and other parameters that all processes have."""
    parameters = parameters_of(problem.classifier)
    x, entered = enter(shards, batch, problem.replicated_input, problem.input, [*parameters, *extra])
    count = len(parameters)
    return x, with_parameters(problem.classifier, entered[:count]), entered[count:]
