"""Pickles of arrays and lists as Python 2, NumPy 1 and NumPy 2 write them, and crafted ones."""

from __future__ import annotations

import contextlib
import pickle
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest

from train.data.sources.plain_pickle import PickleError, read_plain_pickle


def batch(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (300, 12)).astype(np.uint8)
    return {"data": pixels, "labels": [0, 7, 300, 70_000, -1], "names": ["a", "b"], "note": None, "ok": True}


def check(read: Any, expected: dict[str, Any]) -> None:
    assert read.keys() == expected.keys()
    assert read["data"].dtype == np.uint8
    np.testing.assert_array_equal(read["data"], expected["data"])
    assert all(read[key] == expected[key] for key in expected if key != "data")


@pytest.mark.parametrize("numpy", ["1", "2"])
@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_python_3(protocol: int, numpy: str, seed: int) -> None:
    content = batch(seed)
    raw = pickle.dumps(content, protocol)
    written, other = (b"numpy._core", b"numpy.core")[:: 1 if b"numpy._core" in raw else -1]
    if (numpy == "1") == (written == b"numpy._core"):
        if protocol >= 4:
            pytest.skip("these protocols write the length of a name")
        raw = raw.replace(written, other)
    check(read_plain_pickle(raw), content)


def test_an_array_in_the_order_of_fortran(seed: int) -> None:
    content = batch(seed)
    content["data"] = np.asfortranarray(content["data"])
    for protocol in (2, 5):
        check(read_plain_pickle(pickle.dumps(content, protocol)), content)


def python_2_string(text: bytes) -> bytes:
    return (b"U" + bytes([len(text)]) if len(text) < 256 else b"T" + struct.pack("<i", len(text))) + text


def python_2_array(array: np.ndarray) -> bytes:
    """Pickle an array as cPickle and NumPy 1 do in Python 2, with protocol 2: strings have no encoding."""
    shape = b"".join(b"M" + struct.pack("<H", n) for n in array.shape)
    dtype = (
        b"cnumpy\ndtype\nq\x05U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    start = b"cnumpy.core.multiarray\n_reconstruct\nq\x06cnumpy\nndarray\nq\x07K\x00\x85U\x01b\x87R"
    return start + b"(K\x01(" + shape + b"t" + dtype + b"\x89" + python_2_string(array.tobytes()) + b"tb"


def python_2_pickle(content: dict[str, Any]) -> bytes:
    pixels = python_2_string(b"data") + python_2_array(content["data"])
    names = python_2_string(b"names") + b"](" + b"".join(map(python_2_string, content["names"])) + b"e"
    labels = (
        python_2_string(b"labels") + b"](" + b"".join(b"K" + bytes([n]) for n in content["labels"]) + b"e"
    )
    return b"\x80\x02}q\x01(" + pixels + names + labels + b"u."


def test_pickles_of_python_2(seed: int) -> None:
    content = {"data": batch(seed)["data"], "names": [b"a", b"\xff" * 300], "labels": [0, 200]}
    raw = python_2_pickle(content)
    standard = pickle.loads(raw, encoding="bytes")  # the pickle is a valid one
    check({key.decode(): value for key, value in standard.items()}, content)
    check(read_plain_pickle(raw), content)


class Runs:
    """A value whose pickle runs code."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


U1 = pickle.dumps(np.arange(16, dtype=np.uint8), 2)
CRAFTED = {
    "code": pickle.dumps(Runs(print, "run"), 2),
    "code, protocol 0": pickle.dumps(Runs(print, "run"), 0),
    "code, protocol 4": pickle.dumps(Runs(print, "run"), 4),
    "objects over bytes": U1.replace(b"u1", b"O8"),
    "floats over bytes": U1.replace(b"u1", b"f8"),
    "an array of objects": pickle.dumps(np.array([None, 1], object), 2),
    "a structured array": pickle.dumps(np.zeros(2, "u1,O"), 2),
    "a larger shape": U1.replace(b"K\x10\x85", b"K\x20\x85"),
    "an instance": b"(inumpy\nndarray\n.",
    "a new object": b"\x80\x02cnumpy\nndarray\n)\x81.",
    "an extension": b"\x80\x02\x82\x01.",
    "a persistent id": b"Px\n.",
    "state of a function": b"c_codecs\nencode\n}U\x01aU\x01bsb.",
    "a call of a list": b"])R.",
    "an item of a list": b"]K\x01K\x02s.",
    "an addition to an array": U1[:-1] + b"K\x01a.",
    "an array without state": U1[: U1.index(b"(K\x01")] + b".",
    "a memo entry that is missing": b"h\x09.",
    "an empty stack": b"s.",
    "no mark": b"]K\x01e.",
    "no end": b"]",
    "a hashed tower of tuples": b"})" + 50_000 * b"\x85" + b"K\x01s.",
    "a huge length": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 45) + b"x.",
    "text that is encoded again and again": b"\x80\x02(c_codecs\nencode\nq\x00X\x00\x00\x01\x00"
    + 65536 * b"x"
    + b"q\x01X\x06\x00\x00\x00latin1q\x02\x86q\x03R"
    + 20_000 * b"h\x00h\x03R"
    + b"l.",
}


@pytest.mark.parametrize("kind", CRAFTED)
def test_crafted_pickles_are_refused(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    tracemalloc.start()
    with pytest.raises(PickleError) as caught:
        read_plain_pickle(CRAFTED[kind])
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_a_huge_memo_index_takes_no_memory() -> None:
    tracemalloc.start()
    assert read_plain_pickle(b"]r\xff\xff\xff\x7f.") == []
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_mutations_of_a_pickle_raise_no_other_error(seed: int) -> None:
    rng = np.random.default_rng(seed)
    raw = np.frombuffer(
        pickle.dumps({"data": np.arange(24, dtype=np.uint8), "labels": [1, 2, 3]}, 2), np.uint8
    )
    for _ in range(1000):
        changed = raw.copy()
        changed[rng.integers(0, len(raw), rng.integers(1, 4))] = rng.integers(0, 256)
        with contextlib.suppress(PickleError):
            read_plain_pickle(changed.tobytes())
