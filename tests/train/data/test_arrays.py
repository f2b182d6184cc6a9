"""The embedded dataset, and files of arrays, valid and invalid."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from train.data.errors import DataError
from train.data.fashion_mnist_lt.make import CLASSES
from train.data.longtail import long_tailed_counts
from train.data.sources.arrays import EMBEDDED, load_arrays


def test_embedded_fashion_mnist() -> None:
    data = load_arrays("fashion-mnist-lt", num_classes=10)
    assert data.train_counts.tolist() == long_tailed_counts(1000, 10, 100)
    assert torch.bincount(data.y_test).tolist() == [400] * 10
    assert data.sample_shape == [1, 28, 28]
    assert data.class_names == CLASSES
    pictures = torch.cat([data.x_train, data.x_test]).flatten(1)
    assert len(pictures.unique(dim=0)) > 0.99 * len(pictures)
    folder = EMBEDDED["fashion-mnist-lt"].parent
    assert "MIT" in (folder / "LICENSE").read_text()
    assert sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) < 5 << 20
    # Not shuffled labels: trousers stand taller than wide, bags do not.
    trousers, bags = (data.x_test[data.y_test == CLASSES.index(name)].float() for name in ("Trouser", "Bag"))
    assert (trousers.mean((0, 1, 2)) > 30).sum() < (bags.mean((0, 1, 2)) > 30).sum()


def test_images_of_all_layouts_give_the_same_tensors(arrays: dict[str, Any], tmp_path: Path) -> None:
    gray = {name: array[..., 0] if name[0] == "x" else array for name, array in arrays.items()}
    with_channel = {name: array[..., None] if name[0] == "x" else array for name, array in gray.items()}
    np.savez(tmp_path / "gray.npz", **gray)
    tensors = {name: torch.tensor(array).contiguous() for name, array in with_channel.items()}
    safetensors.torch.save_file(tensors, tmp_path / "gray.safetensors")
    a, b = (load_arrays(str(tmp_path / name)) for name in ("gray.npz", "gray.safetensors"))
    assert a.sample_shape == [1, 10, 10]
    for name in ("x_train", "y_train", "x_test", "y_test", "train_counts"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert a.fingerprint() == b.fingerprint()
    assert torch.equal(a.x_train[3, 0], torch.tensor(arrays["x_train"][3, :, :, 0]))


def test_half_precision_features(feature_arrays: dict[str, Any], tmp_path: Path) -> None:
    tensors = {name: torch.tensor(array) for name, array in feature_arrays.items()}
    for name in ("x_train", "x_test"):
        tensors[name] = tensors[name].bfloat16()
    safetensors.torch.save_file(tensors, tmp_path / "f.safetensors")
    data = load_arrays(str(tmp_path / "f.safetensors"))
    assert data.x_train.dtype == torch.float32
    assert torch.equal(data.x_train, tensors["x_train"].float())


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arrays: {key: value for key, value in arrays.items() if key != name}


def changed(
    name: str, change: Callable[[np.ndarray], np.ndarray]
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arrays: arrays | {name: change(arrays[name])}


def named(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arrays: change(arrays) | {"classes": np.array(list("abcde"))}


def put(index: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("y_test"),
            "expected the arrays x_train, y_train, x_test, y_test, got x_train, y_train, x_test",
        ),
        (changed("x_train", lambda x: x[:-1]), "y_train: expected 231 labels to match x_train, got 232"),
        (
            changed("y_test", lambda y: y[:, None]),
            r"y_test: expected integer labels \[n\], got int64 \[100, 1\]",
        ),
        (changed("y_test", lambda y: y * 1.0), r"y_test: expected integer labels \[n\], got float64 \[100\]"),
        (changed("y_test", put(3, 5)), "y_test: expected only classes that y_train has, got 5 too"),
        (named(changed("y_train", put(3, -1))), "y_train: expected labels of at least 0, .* got -1"),
        (named(changed("y_train", put(3, 7))), "classes: expected 8 names to match y_train, got 5"),
        (named(changed("y_test", put(3, 7))), "y_test: expected labels below 5, the number of names, got 7"),
        (lambda arrays: arrays | {"classes": np.array("a")}, r"classes: expected names \[K\], got <U1 \[\]"),
        (
            lambda arrays: arrays | {"classes": np.array([["a"] * 5])},
            r"classes: expected names \[K\], got <U1 \[1, 5\]",
        ),
        (changed("x_train", lambda x: x[0, 0, 0, 0]), r"x_train: expected uint8 images .* got uint8 \[\]"),
        (changed("x_train", lambda x: x[:, :0]), r"x_train: expected samples that are not empty"),
        (
            changed("x_test", lambda x: x[:, 1:]),
            r"x_test: expected samples of x_train's shape .* got \[3, 9, 10\]",
        ),
        (changed("x_test", lambda x: x[:0]), "x_test: expected at least one sample, got none"),
        (
            changed("x_train", lambda x: x / 255),
            r"x_train: expected uint8 images .* got float64 \[232, 10, 10, 3\]",
        ),
        (changed("x_train", lambda x: x.transpose(0, 3, 1, 2)), r"x_train: .* got uint8 \[232, 3, 10, 10\]"),
        (lambda arrays: arrays | {"classes": np.array(["a", "b"])}, "classes: expected 5 names .*, got 2"),
        (
            lambda arrays: arrays | {"classes": np.array([{}], object)},
            "expected a readable .npz file, got Object",
        ),
    ],
)
def test_invalid_arrays(
    change: Callable[[dict[str, Any]], dict[str, Any]], message: str, arrays: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "wrong.npz"
    np.savez(path, **change(arrays))
    with pytest.raises(DataError, match=message) as caught:
        load_arrays(str(path))
    assert str(caught.value).startswith(f"{path}: ")


def test_invalid_files(image_file: Path, feature_arrays: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected an existing file, got none"):
        load_arrays(str(tmp_path / "nothing.npz"))
    with pytest.raises(
        DataError, match=r"expected a file named .npz or .safetensors, or one of fashion-mnist-lt"
    ):
        load_arrays("fashion-mnist")
    with pytest.raises(DataError, match=r"y_train: expected 9 classes \(--num-classes\), got 5"):
        load_arrays(str(image_file), num_classes=9)
    for name in ("torn.npz", "torn.safetensors"):
        (tmp_path / name).write_bytes(image_file.read_bytes()[:3000])
        with pytest.raises(DataError, match="expected a readable"):
            load_arrays(str(tmp_path / name))
    feature_arrays["x_train"][4, 2] = np.nan
    np.savez(tmp_path / "nan.npz", **feature_arrays)
    message = f"x_train: expected finite features, got 1 of {feature_arrays['x_train'].size:,} values infinite or NaN"
    with pytest.raises(DataError, match=message):
        load_arrays(str(tmp_path / "nan.npz"))


def test_a_single_array_named_npz_is_named(arrays: dict[str, Any], tmp_path: Path) -> None:
    with open(tmp_path / "a.npz", "wb") as file:
        np.save(file, arrays["x_train"])
    with pytest.raises(
        DataError, match=r"a\.npz: expected arrays from numpy.savez, got a single array from numpy.save"
    ):
        load_arrays(str(tmp_path / "a.npz"))


def test_names_may_be_bytes_or_integers(arrays: dict[str, Any], tmp_path: Path) -> None:
    for names, expected in (
        (np.array([b"a", b"b", b"c", b"d", b"e"]), list("abcde")),
        (np.arange(5), list("01234")),
    ):
        np.savez(tmp_path / "a.npz", **arrays, classes=names)
        assert load_arrays(str(tmp_path / "a.npz")).class_names == expected
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    safetensors.torch.save_file(tensors | {"classes": torch.arange(10, 15)}, tmp_path / "a.safetensors")
    assert load_arrays(str(tmp_path / "a.safetensors")).class_names == ["10", "11", "12", "13", "14"]
    for metadata in ('"abcde"', '{"a": 1}', "[1, 2, 3, 4, 5]", "["):
        safetensors.torch.save_file(tensors, tmp_path / "b.safetensors", {"classes": metadata})
        with pytest.raises(DataError, match=r"b\.safetensors: expected a (list of texts|readable)"):
            load_arrays(str(tmp_path / "b.safetensors"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_flipped_bytes_of_an_npz_are_found(save: Callable[..., None], seed: int, tmp_path: Path) -> None:
    """A file with flipped bits is refused, or gives the arrays that were saved."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (6, 3, 3)).astype(np.uint8)
    save(tmp_path / "a.npz", x_train=x, y_train=np.arange(6), x_test=x, y_test=np.arange(6))
    expected = load_arrays(str(tmp_path / "a.npz")).fingerprint()
    whole = (tmp_path / "a.npz").read_bytes()
    for _ in range(100):
        position, bit = rng.integers(len(whole)), 1 << int(rng.integers(8))
        changed = bytes([whole[position] ^ bit])
        (tmp_path / "b.npz").write_bytes(whole[:position] + changed + whole[position + 1 :])
        with contextlib.suppress(DataError):
            assert load_arrays(str(tmp_path / "b.npz")).fingerprint() == expected
