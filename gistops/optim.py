"""An optimizer that updates the rows with a gradient alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ._dtensor import local

#: Options that choose how a step is computed: they depend on the machine and on sharding.
IMPLEMENTATION = ("foreach", "fused", "capturable")


class RowOptimizer(torch.optim.Optimizer):
    """An optimizer of PyTorch, applied to the rows of a parameter that have a gradient.

    For the sparse gradients of losses with `sample_negatives`: only the drawn rows, and the same rows of the optimizer's state, are
    read and written. Other rows have no weight decay, and their momentum waits, as in `torch.optim.SparseAdam` and in Partial FC (An
    et al., ICCV Workshops 2021). Counts of steps, as Adam has them, are those of the parameter. SGD's `dampening` applies to the first
    gradient of a row, too, after the parameter's first step. A dense gradient updates all rows.

        head, other = RowOptimizer(torch.optim.SGD, [head.centers], lr=0.1, momentum=0.9), torch.optim.SGD(others, lr=0.1)

    Parameters may be DTensors of sharded heads. State dicts are those of other optimizers, so that
    `torch.distributed.checkpoint.state_dict` handles them. Learning rate schedules change `param_groups` as usual.

    Args:
        optimizer: a class of `torch.optim` whose update of an element depends on the element alone, such as SGD, Adagrad, Adam or
            AdamW.
        params: parameters or groups of them.
        options: arguments of the class.

    Raises:
        TypeError: `optimizer` is not a class of optimizers.
        ValueError: an update with it would not be that of the rows alone, as with Adafactor, LBFGS, Muon and Rprop.
    """

    def __init__(self, optimizer: type[torch.optim.Optimizer], params: Iterable[Any], **options: Any) -> None:
        if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
            raise TypeError(f"optimizer: expected a class of torch.optim, got {optimizer!r}")
        self._optimizer = optimizer
        self._options = options
        defaults = optimizer([torch.zeros(1, 1)], **options).defaults
        _check_rows(optimizer, options)
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies, to which the base class would not give attributes of a subclass."""
        return {**super().__getstate__(), "_optimizer": self._optimizer, "_options": self._options}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the rows that have a gradient.

        Args:
            closure: computes the loss and the gradients again, and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            current = {name: group[name] for name in self.defaults}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, current)
        return loss

    def _update(self, parameter: Tensor, current: dict[str, Any]) -> None:
        """Update a parameter; current: the values of its group's options."""
        grad, values = local(parameter.grad), local(parameter)
        index = None
        if grad.is_sparse:
            grad = grad.coalesce()
            index, grad = grad.indices()[0], grad.values()
        # A view or a copy: the update below is in-place.
        rows = values.detach() if index is None else values[index]
        state = self.state[parameter]
        inner = self._optimizer([rows], **self._options)
        inner.param_groups[0].update(current)
        rows.grad = grad
        # Adagrad's constructor makes a state, whose value is that of all rows that have none yet.
        initial = (
            {} if state else {name: value.flatten()[:1].clone() for name, value in inner.state[rows].items()}
        )
        for name, value in state.items():
            inner.state[rows][name] = _rows_of(value, parameter, index)
        inner.step()
        for name, value in inner.state[rows].items():
            if not isinstance(value, Tensor) or value.shape != rows.shape:
                state[name] = value
                continue
            if name not in state:
                state[name] = torch.zeros_like(parameter)
                if name in initial and len(initial[name]):
                    local(state[name]).copy_(initial[name])
            _write(state[name], value, index)
        _write(parameter, rows, index)


def _check_rows(optimizer: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    """Check an optimizer by one step.

    The step of two rows must be those of each row. A row of zeros without a gradient must get the state that `RowOptimizer` gives
    to rows before their first update: zeros, or what the constructor makes.

    Raises:
        ValueError: it is not so.
    """

    def stepped(rows: Tensor, grad: Tensor) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
        rows = rows.clone()
        inner = optimizer([rows], **options)
        inner.param_groups[0].update({name: False for name in IMPLEMENTATION if name in inner.defaults})
        inner.param_groups[0]["lr"] = 1.0  # that of a warm-up may begin at 0
        first = {name: x.clone() for name, x in inner.state[rows].items() if isinstance(x, Tensor)}
        rows.grad = grad
        inner.step()
        return rows, first, inner.state[rows]

    rows = torch.tensor([[1.0, -2.0], [0.5, 3.0], [0.0, 0.0]], device="cpu")
    grad = torch.tensor([[0.5, 1.0], [-4.0, 0.25], [0.0, 0.0]], device="cpu")
    try:
        together, first, state = stepped(rows, grad)
        alone = torch.cat([stepped(row, g)[0] for row, g in zip(rows.split(1), grad.split(1), strict=True)])
    except (TypeError, RuntimeError) as error:  # no step with a dense gradient and without a closure
        raise ValueError(_refusal(optimizer, str(error))) from error
    if not torch.allclose(together, alone):
        raise ValueError(_refusal(optimizer, "one where rows depend on each other"))
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == rows.shape:
            initial = first[name][2] if name in first else torch.zeros(2, device="cpu")
            if not torch.allclose(value[2], initial, atol=1e-3):
                raise ValueError(_refusal(optimizer, f"one whose {name} starts at {value[2, 0].item():g}"))


def _refusal(optimizer: type[torch.optim.Optimizer], got: str) -> str:
    return (
        "optimizer: expected a class whose update of an element depends on the element alone, with a state that starts at "
        f"zero or in its constructor, got {optimizer.__name__}: {got}"
    )


def _rows_of(value: Any, parameter: Tensor, index: Tensor | None) -> Any:
    """Return the rows of a state with a row per row of the parameter; and any other state itself."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return local(value) if index is None else local(value)[index]


def _write(whole: Tensor, rows: Tensor, index: Tensor | None) -> None:
    part = local(whole)
    if index is None:
        part.copy_(rows)
    else:
        part[index] = rows
