"""A reader of pickles that hold dictionaries, lists, integers, text and uint8 arrays, and nothing else.

A pickle is a program: `pickle.load` may run any code, and even a list of permitted names lets a crafted file build an array
of objects over bytes of its choice. This reader runs no program. It interprets the few opcodes that such data need, and the
names that NumPy writes (`numpy.dtype` and so on) stand for nothing but a uint8 array over bytes of the pickle. Memory is
bounded by a small multiple of the pickle's size.
"""

from __future__ import annotations

import pickletools
from typing import Any

import numpy as np


class PickleError(ValueError):
    """A pickle that holds anything else, or that is damaged."""


class _Name:
    """A global that a pickle refers to by its name. It stands for itself and cannot be called."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Array:
    """The place of an array. Its content comes with a later opcode."""

    values: np.ndarray | None = None


MAX_KEY = 100  # characters

_MARK, _DTYPE = object(), object()  # the mark on the stack; the dtype uint8

#: The names that NumPy 1 and 2 write -> their meaning here.
_MEANINGS = {
    "numpy.ndarray": "ndarray",
    "numpy.dtype": "dtype",
    "_codecs.encode": "encode",
    **{f"numpy.{core}.multiarray._reconstruct": "reconstruct" for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": "frombuffer" for core in ("core", "_core")},
}
_IGNORED = {"PROTO", "FRAME"}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
_BYTES_OF_PYTHON_2 = {"STRING", "BINSTRING", "SHORT_BINSTRING"}  # pickletools decodes them as Latin-1
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


def read_plain_pickle(content: bytes) -> Any:
    """Return the value of a pickle. Strings of Python 2 are bytes.

    Raises:
        PickleError: the pickle holds something else, or is damaged.
    """
    try:
        value = _Machine(len(content)).run(content)
    except PickleError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
        raise PickleError(f"a damaged pickle ({error})") from None
    if isinstance(value, dict):
        return {key: _content(entry) for key, entry in value.items()}
    return _content(value)


def _content(value: Any) -> Any:
    if not isinstance(value, _Array):
        return value
    if value.values is None:
        raise PickleError("an array without content")
    return value.values


class _Machine:
    """The stack and the memo of one pickle.

    Args:
        size: length of the pickle in bytes.
    """

    def __init__(self, size: int) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.encodable = (
            size  # characters that may still be encoded: otherwise one text could be encoded many times
        )

    def run(self, content: bytes) -> Any:
        argument: Any
        for opcode, argument, _ in pickletools.genops(content):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in _VALUES:
                self.stack.append(argument)
            elif name in _BYTES_OF_PYTHON_2:
                self.stack.append(argument.encode("latin-1"))
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name == "BYTEARRAY8":
                self.stack.append(bytes(argument))
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[argument])
            elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                self.memo[argument] = self.stack[-1]
            elif name == "GLOBAL":
                self.stack.append(_Name(argument.replace(" ", ".")))
            elif name not in _IGNORED:
                self._build(name)
        raise PickleError("a pickle without an end")

    def _build(self, name: str) -> None:
        """Carry out an opcode that takes values from the stack."""
        stack = self.stack
        if name == "MARK":
            stack.append(_MARK)
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name == "TUPLE":
            stack.append(tuple(self._to_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(self._last(int(name[-1]))))
        elif name == "LIST":
            stack.append(self._to_mark())
        elif name == "DICT":
            stack.append(_update({}, self._to_mark()))
        elif name in ("APPEND", "APPENDS"):
            items = self._last(1) if name == "APPEND" else self._to_mark()
            _expect(isinstance(stack[-1], list), "a list to append to")
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._last(2) if name == "SETITEM" else self._to_mark()
            _update(stack[-1], items)
        elif name == "STACK_GLOBAL":
            module, attribute = self._last(2)
            stack.append(_Name(f"{module}.{attribute}"))
        elif name == "REDUCE":
            function, arguments = self._last(2)
            stack.append(self._call(function, arguments))
        elif name == "BUILD":
            (state,) = self._last(1)
            _set_state(stack[-1], state)
        else:
            raise PickleError(f"a pickle that uses the opcode {name}")

    def _last(self, count: int) -> list[Any]:
        """Take the last values off the stack."""
        _expect(len(self.stack) >= count, "more values")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def _to_mark(self) -> list[Any]:
        """Take the values after the last mark, and the mark, off the stack."""
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _call(self, function: Any, arguments: Any) -> Any:
        """Return the value that stands for a call by the pickle."""
        _expect(isinstance(function, _Name) and isinstance(arguments, tuple), "a name and a tuple")
        meaning = _MEANINGS.get(function.name, "")
        if meaning == "reconstruct":
            _expect(_meaning(arguments[0]) == "ndarray", "numpy.ndarray")
            return _Array()
        if meaning == "dtype":
            _expect(arguments[0] in ("u1", b"u1"), "the dtype uint8")
            return _DTYPE
        if meaning == "encode":
            text, encoding = arguments
            _expect(isinstance(text, str) and encoding in ("latin1", b"latin1"), "text in Latin-1")
            self.encodable -= len(text)
            _expect(self.encodable >= 0, "no more text than the pickle holds")
            return text.encode("latin-1")
        if meaning == "frombuffer":
            buffer, dtype, shape, order = arguments
            array = _Array()
            array.values = _array(buffer, dtype, shape, order)
            return array
        raise PickleError(f"a pickle that uses {function.name}")


def _set_state(target: Any, state: Any) -> None:
    _expect(isinstance(state, tuple), "a tuple as the state of an array")
    if isinstance(target, _Array):
        shape, dtype, is_fortran, content = state[-4:]
        target.values = _array(content, dtype, shape, "F" if is_fortran else "C")
    else:
        # The rest of the state describes fields and subarrays, which uint8 does not have.
        _expect(target is _DTYPE and not any(state[2:5]), "the dtype uint8")


def _array(content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """Return a read-only array over bytes of the pickle."""
    _expect(dtype is _DTYPE and isinstance(content, bytes), "bytes of the dtype uint8")
    _expect(isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape), "a shape")
    _expect(order in ("C", "F"), "the order C or F")
    array: np.ndarray = np.frombuffer(content, np.uint8).reshape(shape, order=order)
    return array


def _update(target: Any, items: list[Any]) -> dict[str, Any]:
    """Add keys and values, in turn, to a dictionary. Keys of bytes become text."""
    _expect(isinstance(target, dict) and len(items) % 2 == 0, "a dictionary, keys and values")
    for key, value in zip(items[::2], items[1::2], strict=True):
        _expect(isinstance(key, str | bytes) and len(key) < MAX_KEY, "a short text as a key")
        target[key if isinstance(key, str) else key.decode("latin-1")] = value
    updated: dict[str, Any] = target
    return updated


def _meaning(value: Any) -> str:
    return _MEANINGS.get(value.name, "") if isinstance(value, _Name) else ""


def _expect(valid: bool, expected: str) -> None:
    if not valid:
        raise PickleError(f"a pickle without {expected} where one is expected")
