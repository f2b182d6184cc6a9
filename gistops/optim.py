"""An optimizer that updates the rows with a gradient alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ._dtensor import local


class RowOptimizer(torch.optim.Optimizer):
    """An optimizer of PyTorch, applied to the rows of a parameter that have a gradient.

    For the sparse gradients of losses with `sample_negatives`: only the drawn rows, and the same rows of the optimizer's state, are
    read and written. Other rows have no weight decay, and their momentum waits, as in `torch.optim.SparseAdam` and in Partial FC (An
    et al., ICCV Workshops 2021). Counts of steps, as Adam has them, are those of the parameter. A dense gradient updates all rows.

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
    """

    def __init__(self, optimizer: type[torch.optim.Optimizer], params: Iterable[Any], **options: Any) -> None:
        if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
            raise TypeError(f"optimizer: expected a class of torch.optim, got {optimizer!r}")
        self._optimizer = optimizer
        self._options = options
        super().__init__(params, optimizer([torch.zeros(1)], **options).defaults)

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
