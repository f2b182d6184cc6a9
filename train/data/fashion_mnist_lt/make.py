"""Make `fashion_mnist_lt100.npz` from the four original files of Fashion-MNIST.

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb fm
    python -m train.data.fashion_mnist_lt.make fm/usr/share/datasets/fashion-mnist

The training set is made long-tailed by the rule of CIFAR-LT: imbalance ratio 100, 1,000 images in the most frequent class,
NumPy seed 0, classes in their original order. The test set is the first 400 images of each class of the original test set.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np

from ..longtail import long_tailed_counts, long_tailed_indices

LARGEST, RATIO, TEST_IMAGES = 1000, 100, 400
CLASSES = [
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
]
OUT = Path(__file__).with_name("fashion_mnist_lt100.npz")


def read_idx(path: Path) -> np.ndarray:
    """Read an array from an idx file: two zero bytes, the type (8: uint8), the rank, the sizes, the data."""
    raw = gzip.decompress(path.read_bytes())
    rank = raw[3]
    shape = np.frombuffer(raw, ">u4", rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def main(source: Path) -> None:
    x, y = (read_idx(source / f"train-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    x_test, y_test = (read_idx(source / f"t10k-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    train = long_tailed_indices(y, long_tailed_counts(LARGEST, len(CLASSES), RATIO))
    test = np.concatenate([np.flatnonzero(y_test == k)[:TEST_IMAGES] for k in range(len(CLASSES))])
    np.savez_compressed(
        OUT,
        x_train=x[train],
        y_train=y[train],
        x_test=x_test[test],
        y_test=y_test[test],
        classes=np.array(CLASSES),
    )
    print(f"{OUT}: {len(train)} training images {np.bincount(y[train])}, {len(test)} test images")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
