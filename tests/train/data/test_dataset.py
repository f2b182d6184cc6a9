"""Statistics and fingerprint of a dataset."""

from __future__ import annotations

import torch

from train.data.dataset import Dataset


def test_mean_and_std_are_those_of_the_training_images(images: Dataset) -> None:
    x = images.x_train.double() / 255
    mean, std = images.mean_std()
    torch.testing.assert_close(mean.double(), x.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(std.double(), x.std((0, 2, 3), correction=0), rtol=1e-6, atol=0)


def test_fingerprint_sees_one_pixel(images: Dataset) -> None:
    before = images.fingerprint()
    images.x_test[3, 1, 2, 4] ^= 1
    assert images.fingerprint() != before
