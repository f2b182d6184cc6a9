"""Registration of ops: schema, kernels, fake kernel, autograd formula, rules of vmap and autocast.

An op's arguments are the fields of one NamedTuple, its record, which the fake kernel and all Python kernels take. Ops
have the same names in every namespace: `torch.ops.gistops` holds the compiled ones, `torch.ops.gistops_triton` Triton's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

#: An integer that may differ from call to call: one compiled graph serves all its values.
SymInt = Annotated[int, "SymInt"]
_libraries: list[torch.library.Library] = []  # kept alive: registrations end with them
_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", int: "int", SymInt: "SymInt", float: "float",
    torch.dtype: "ScalarType", torch.dtype | None: "ScalarType?",
}  # fmt: skip


class Op(NamedTuple):
    """An op, for any namespace.

    Args:
        name: the op's name.
        arguments: record of the arguments, a NamedTuple.
        returns: record of the outputs, or Tensor.
        fake: the fake kernel; takes the record of the arguments.
        backward: autograd formula, `backward(ops, ctx, *grads)`, where `ops` is the namespace; None: not differentiable.
        save: `setup_context` of the formula.
        autocast: number of leading tensors that autocast may cast; None: the op has no autocast rule.
    """

    name: str
    arguments: type[Any]
    returns: type[Any]
    fake: Callable[[Any], Any]
    backward: Callable[..., Any] | None = None
    save: Callable[..., None] | None = None
    autocast: int | None = None

    def schema(self) -> str:
        """Return the schema in torch's notation, with the name but without a namespace."""
        fields = ", ".join(_fields(self.arguments))
        returns = "Tensor" if self.returns is Tensor else f"({', '.join(_fields(self.returns))})"
        return f"{self.name}({fields}) -> {returns}"


def _fields(record: type[Any]) -> list[str]:
    defaults = record._field_defaults
    return [
        f"{_SCHEMA_TYPES[kind]} {name}" + (f"={defaults[name]}" if name in defaults else "")
        for name, kind in get_type_hints(record, include_extras=True).items()
    ]


def define(ops: Any, op: Op, kernel: Callable[[Any], Any], devices: Sequence[str]) -> None:
    """Define an op with a Python kernel and complete it.

    Args:
        ops: the namespace, such as `torch.ops.gistops_triton`.
        op: the op.
        kernel: takes the record of the arguments.
        devices: dispatch keys that the kernel serves, "CUDA" or "CPU".
    """
    library = torch.library.Library(ops.name, "FRAGMENT")
    _libraries.append(library)
    library.define(op.schema())
    for device in devices:
        implement(ops, op, kernel, device)
    complete(ops, op)


def implement(ops: Any, op: Op, kernel: Callable[[Any], Any], key: str) -> None:
    """Register a Python kernel of a defined op for a dispatch key."""
    _register(ops, op.name, lambda *arguments: kernel(op.arguments(*arguments)), key)


def complete(ops: Any, op: Op) -> None:
    """Register the fake kernel, the autograd formula, the rules of vmap and of autocast of a defined op."""
    name = f"{ops.name}::{op.name}"
    torch.library.register_vmap(name, functools.partial(_once_per_sample, getattr(ops, op.name).default))
    torch.library.register_fake(name, functools.partial(_fake, op))
    if op.backward is not None:
        backward = functools.partial(op.backward, ops)
        torch.library.register_autograd(name, backward, setup_context=op.save)
    if op.autocast is not None:
        _cpu_dtypes(ops)  # asked now: a graph that is traced later cannot hold the question
        for device in ("CPU", "CUDA"):
            _register(ops, op.name, _autocast(ops, op, device.lower()), f"Autocast{device}")


def _fake(op: Op, *arguments: Any) -> Any:
    """Call the fake kernel of an op.

    Raises:
        RuntimeError: the tensors are on several devices. One meta tensor is enough for torch to select this kernel, which
            would return uninitialized memory on the device of the others.
    """
    record = op.arguments(*arguments)
    tensors = {name: x for name, x in zip(record._fields, record, strict=True) if isinstance(x, Tensor)}
    reference = "centers" if "centers" in tensors else next(iter(tensors))
    device = tensors[reference].device
    for name, x in tensors.items():
        if x.device != device:
            raise RuntimeError(
                f"{op.name}: {name}: expected device {device} to match {reference}, got {x.device}"
            )
    return op.fake(record)


def _once_per_sample(operator: Any, info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    """Call an op once per sample of a `torch.vmap`; return the stacked outputs and their dimension, 0."""
    outputs = [
        operator(*(x if d is None else x.select(d, i) for x, d in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(outputs[0], Tensor):
        return torch.stack(outputs), 0
    return tuple(map(torch.stack, zip(*outputs, strict=True))), (0,) * len(outputs[0])


def _register(ops: Any, name: str, kernel: Callable[..., Any], key: str) -> None:
    library = torch.library.Library(ops.name, "IMPL")
    _libraries.append(library)
    library.impl(name, kernel, key)


def _autocast(ops: Any, op: Op, device: str) -> Callable[..., Any]:
    """Return the autocast kernel of an op: it calls `cast_operands`.

    The outputs are float32, and tau is never cast.
    """
    operator = getattr(ops, op.name).default
    operands = op.autocast
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def kernel(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*cast_operands(ops, device, arguments[:operands]), *arguments[operands:])

    return kernel


def cast_operands(ops: Any, device: str, operands: Sequence[Tensor]) -> Sequence[Tensor]:
    """Cast tensors [..., d] to the dtype of autocast, float64 tensors excepted.

    The CPU's kernels compute in float32 from any mix of dtypes. They are faster in half precision only on processors
    with units for this dtype, and for an even d; elsewhere a cast would lose bits and gain no time.
    """
    dtype = autocast_dtype(ops, device, operands[0].shape[-1])
    return operands if dtype is None else [x if x.dtype == torch.float64 else x.to(dtype) for x in operands]


def autocast_dtype(ops: Any, device: str, d: int) -> torch.dtype | None:
    """Return the dtype to which autocast rounds tensors [..., d], or None if it leaves them."""
    dtype = torch.get_autocast_dtype(device)
    return None if device == "cpu" and (dtype not in _cpu_dtypes(ops) or d % 2) else dtype


@functools.cache
def _cpu_dtypes(ops: Any) -> tuple[torch.dtype, ...]:
    """Return the dtypes that the CPU kernels of a namespace multiply on units made for them."""
    if not hasattr(ops, "cpu_multiplies"):
        return ()
    return tuple(x for x in (torch.bfloat16, torch.float16) if ops.cpu_multiplies.default(x))


def below_autocast() -> Any:
    """Return a context in which ops are not cast, for kernels that call ops: a backward may run inside autocast."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    return torch._C._ExcludeDispatchKeyGuard(keys.add(torch._C.DispatchKey.AutocastCUDA))


def no_autocast(device_type: str) -> Any:
    """Return a context without autocast on a device type; unlike `below_autocast`, torch.compile can trace it."""
    if has_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def has_autocast(device_type: str) -> bool:
    return bool(torch.amp.is_autocast_available(device_type))


has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch 2.11 cannot trace it


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of logits, norms and sums: float64 if any argument is float64, otherwise float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def widest_dtype(device_type: str) -> torch.dtype:
    """Return the widest floating-point dtype of a device type; Apple's GPUs have no float64."""
    return torch.float32 if device_type == "mps" else torch.float64


def nonzero_tau(tau: Tensor) -> Tensor:
    """Return τ, of magnitude 1e-20 at least, as the kernels use it: a cosine is found as logit / τ.

    The gradient of τ passes unchanged.
    """
    smallest = torch.where(tau < 0, torch.full_like(tau, -1e-20), torch.full_like(tau, 1e-20))
    return tau + torch.where(tau.abs() < 1e-20, smallest - tau, 0).detach()


def is_dynamic(*sizes: int) -> bool:
    """Return True in a compiled graph that serves more than one value of a size."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not all(has_static_value(size) for size in sizes)


def needed_gradients(
    gradients: Sequence[Tensor], arguments: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of those arguments that need one, in the arguments' dtypes, and None for the others."""
    return [
        (g if g.dtype == x.dtype else g.to(x.dtype)) if needed else None
        for g, x, needed in zip(gradients, arguments, needs, strict=False)
    ]


def no_double_backward(ops: Any, ctx: Any, *grads: Tensor) -> None:
    """Raise: the autograd formula of every backward op."""
    raise NotImplementedError(
        "the ops of gistops are differentiable once; for second derivatives use backend='reference' or torch.func"
    )
