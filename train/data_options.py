"""The options of the dataset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .options import Mark, Section, option


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """The dataset."""

    #: One of: a .npz or .safetensors file with x_train, y_train, x_test, y_test and optionally x_val, y_val,
    #: where x is uint8 images [n, h, w] or [n, h, w, c], or floating-point features [n, d]; the archive of
    #: CIFAR (cifar-100-python.tar.gz); a list of image files, which is .txt (path and label, as
    #: ImageNet-LT), .csv or .json (iNaturalist); a folder with train/ and test/ (or val/) that hold a folder
    #: per class; with --hold-out a folder of class folders; fashion-mnist-lt, which is included; or glyphs,
    #: which renders 8,141 Chinese characters with the installed fonts.
    data: str = option("", Mark.CHANGEABLE)
    #: List or folder of test images. If not given, the file beside --data whose name has test (or val) in
    #: place of train.
    test_data: str = option("", Mark.CHANGEABLE)
    #: List or folder of validation images. If neither --val-data nor --test-data is given, the file
    #: beside --data whose name has val in place of train, provided that there is one with test. Epochs are
    #: evaluated on the validation images, final results on the test images.
    val_data: str = option("", Mark.CHANGEABLE)
    #: Folder that relative paths in lists start from; the folder of the list if not given.
    images: str = option("", Mark.CHANGEABLE)
    #: OLD=NEW: replace the prefix OLD of paths in lists by NEW, for example data_256/a/=train/.
    path_prefixes: tuple[str, ...] = option((), Mark.CHANGEABLE)
    #: Side in pixels of the squares that image files are cropped and resized to when they are decoded, and
    #: that characters are rendered at. Done once; the result is kept in --cache.
    image_size: int = 64
    #: Stop at image files and class folders that cannot be read, or skip them with a warning. Both name them.
    unreadable: Literal["stop", "skip"] = "stop"
    #: Folder of decoded and rendered images; ~/.cache/gistops/images if not given.
    cache: str = option("", Mark.UNRECORDED)
    #: Subsample the training set to this ratio between the largest and the smallest class, with the
    #: exponential profile of CIFAR-LT. 1 keeps all samples.
    imbalance_ratio: float = 1.0
    #: Number of classes that the data must have; not checked if not given.
    num_classes: int | None = option(None, Mark.DATASET)

    #: Hold this fraction of each class's training samples out, at random: as the test samples if there are none,
    #: otherwise as the validation samples. Each class with two samples or more holds out at least one and keeps
    #: at least one. In arrays and archives, after --imbalance-ratio; in folders and lists, before it.
    hold_out: float = 0.0
    #: Then hold this fraction of what is left of each class out, as the validation samples. A class with one sample
    #: left keeps it. The test samples are the same with and without it.
    hold_out_val: float = 0.0
    #: Seed of --hold-out and --hold-out-val.
    hold_out_seed: int = 0

    def __post_init__(self) -> None:
        self._expand_home("data", "test_data", "val_data", "images", "cache")
        self._expect_at_least(1, "imbalance_ratio", "image_size", "num_classes")
        self._expect_at_least(0, "hold_out_seed")
        self._expect("hold_out_seed", self.hold_out_seed < 2**32, "below 2^32")
        for name in ("hold_out", "hold_out_val"):
            self._expect(name, 0 <= getattr(self, name) < 1, "a fraction, at least 0 and below 1")
