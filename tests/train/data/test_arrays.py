"""The embedded data, files of arrays good and bad, and the streams."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from train.config import DataConfig
from train.data.dataset import Dataset
from train.data.errors import DataError
from train.data.fashion_mnist_lt.make import CLASSES
from train.data.load import load
from train.data.longtail import long_tailed_counts, long_tailed_indices
from train.data.sources.arrays import EMBEDDED, load_arrays
from train.data.stream.augment import NUM_UNIFORMS, Augmentation
from train.data.stream.streams import RandomStream

from ..conftest import COUNTS, shared_file


@pytest.mark.parametrize(
    ("largest", "num_classes", "ratio", "total"),
    [(500, 100, 100, 10847), (500, 100, 50, 12608), (500, 100, 10, 19573), (5000, 10, 100, 12406)],
)
def test_published_totals_of_cifar_lt(largest: int, num_classes: int, ratio: int, total: int) -> None:
    counts = long_tailed_counts(largest, num_classes, ratio)
    assert sum(counts) == total
    assert (counts[0], counts[-1]) == (largest, largest // ratio)


def test_counts_of_the_real_cifar100_lt() -> None:
    data = load_arrays(str(shared_file("cifar100_lt100.npz")), num_classes=100)
    assert data.train_counts.tolist() == long_tailed_counts(500, 100, 100)
    assert data.sample_shape == [3, 32, 32]
    assert torch.bincount(data.y_test).tolist() == [100] * 100


def test_long_tailed_subset_has_its_counts_and_no_repeats(seed: int) -> None:
    y = np.random.default_rng(seed).integers(0, 7, 5000)
    counts = long_tailed_counts(300, 7, 30)
    chosen = long_tailed_indices(y, counts)
    assert np.bincount(y[chosen]).tolist() == counts
    assert len(set(chosen.tolist())) == len(chosen)
    assert (chosen == long_tailed_indices(y, counts)).all()
    with pytest.raises(ValueError, match="class 0: expected at least 5000 samples, got"):
        long_tailed_indices(y, [5000] * 7)


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


def test_mean_and_std_are_those_of_the_training_images(images: Dataset) -> None:
    x = images.x_train.double() / 255
    mean, std = images.mean_std()
    torch.testing.assert_close(mean.double(), x.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(std.double(), x.std((0, 2, 3), correction=0), rtol=1e-6, atol=0)


def test_fingerprint_sees_one_pixel(images: Dataset) -> None:
    before = images.fingerprint()
    images.x_test[3, 1, 2, 4] ^= 1
    assert images.fingerprint() != before


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arrays: {key: value for key, value in arrays.items() if key != name}


def changed(
    name: str, change: Callable[[np.ndarray], np.ndarray]
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arrays: arrays | {name: change(arrays[name])}


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
        (changed("y_train", put(3, -1)), "y_train: expected labels of at least 0, got -1"),
        (changed("y_test", put(3, 5)), "y_test: expected labels below 5 as in y_train, got 5"),
        (
            changed("y_train", put(3, 7)),
            "y_train: expected at least one sample of each class from 0 to 7, got none of 5, 6",
        ),
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
def test_wrong_arrays(
    change: Callable[[dict[str, Any]], dict[str, Any]], message: str, arrays: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "wrong.npz"
    np.savez(path, **change(arrays))
    with pytest.raises(DataError, match=message) as caught:
        load_arrays(str(path))
    assert str(caught.value).startswith(f"{path}: ")


def test_wrong_files(image_file: Path, feature_arrays: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected an existing file, got none"):
        load_arrays(str(tmp_path / "nothing.npz"))
    with pytest.raises(
        DataError, match=r"expected a file named .npz or .safetensors, or one of fashion-mnist-lt"
    ):
        load_arrays("fashion-mnist")
    with pytest.raises(DataError, match=r"y_train: expected 9 classes \(--num-classes\), got labels up to 4"):
        load_arrays(str(image_file), num_classes=9)
    for name in ("torn.npz", "torn.safetensors"):
        (tmp_path / name).write_bytes(image_file.read_bytes()[:3000])
        with pytest.raises(DataError, match="expected a readable"):
            load_arrays(str(tmp_path / name))
    feature_arrays["x_train"][4, 2] = np.nan
    np.savez(tmp_path / "nan.npz", **feature_arrays)
    with pytest.raises(
        DataError, match="x_train: expected finite features, got 1 values that are not finite"
    ):
        load_arrays(str(tmp_path / "nan.npz"))


def test_random_stream_passes_over_all_samples(seed: int) -> None:
    size = sum(COUNTS)
    stream = RandomStream(size, torch.Generator().manual_seed(seed))
    taken = torch.cat([stream.take(count) for count in [7] * 100])
    passes = taken[: len(taken) // size * size].view(-1, size)
    assert len(passes) >= 3
    for one in passes:
        assert torch.equal(one.sort().values, torch.arange(size))
    assert not torch.equal(passes[0], passes[1])


def test_augmentation_against_one_image_at_a_time(seed: int) -> None:
    images = torch.randint(0, 256, (64, 3, 9, 7), dtype=torch.uint8)
    out = Augmentation(2, True)(images, torch.rand(len(images), NUM_UNIFORMS))
    assert out.shape == images.shape
    padded = F.pad(images, (2, 2, 2, 2))
    crops = {
        (top, left): padded[:, :, top : top + 9, left : left + 7] for top in range(5) for left in range(5)
    }
    candidates = {(*place, flip): x.flip(3) if flip else x for place, x in crops.items() for flip in (0, 1)}
    places = []
    for i in range(len(images)):
        found = [place for place, candidate in candidates.items() if torch.equal(candidate[i], out[i])]
        assert len(found) == 1  # the images are noise: no two crops look the same
        places += found
    assert len({place[:2] for place in places}) > 10
    assert {place[2] for place in places} == {0, 1}
    assert Augmentation()(images, torch.rand(len(images), NUM_UNIFORMS)) is images


def test_a_tail_longer_than_the_largest_class_allows(image_file: Path) -> None:
    assert load(DataConfig(data=str(image_file), imbalance_ratio=60)).train_counts.tolist()[0] == COUNTS[0]
    expected = r"--imbalance-ratio: expected at most 120, the size of the largest class, got 200, which leaves 1 classes without"
    with pytest.raises(DataError, match=expected):
        load(DataConfig(data=str(image_file), imbalance_ratio=200))
