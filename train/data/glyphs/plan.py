"""The images of the glyphs dataset: how many per class, and each image's font face and deformation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .drawing import Variation
from .faces import FAMILIES

#: The range from which the deformations of training images are drawn uniformly: angle, shear, stretch, shrink, weight.
VARIATION_LOW = Variation(-0.12, -0.12, -0.15, -0.2, -1.0)
VARIATION_HIGH = Variation(0.12, 0.12, 0.15, 0.0, 1.0)

ClassFaces = Sequence[
    Mapping[str, list[int]]
]  # for each class: font family -> indices of the faces that draw it


@dataclass(frozen=True)
class Rule:
    """The parameters that define the dataset.

    A character has max(smallest, largest · sqrt(f / f_max)) training images, where f is its frequency and f_max the
    highest frequency. The square root is the field's usual compromise between sampling by frequency and uniform
    sampling (Mahajan et al., ECCV 2018). In proportion to the frequency itself, seven of eight classes would have
    `smallest` images.

    The training images of a class cycle through the font families; each image has a random face of its family and a
    random deformation. The validation and test splits have one undeformed image per class and family.
    """

    num_classes: int = 8141
    largest: int = 300
    smallest: int = 3
    families: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: FAMILIES)
    fewest_families: int = 3  # training families that must draw a character
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """The images of a split: class [n], index of the face [n], deformation [n, 5]."""

    labels: np.ndarray
    faces: np.ndarray
    variations: np.ndarray


def training_counts(frequencies: Sequence[int], rule: Rule) -> np.ndarray:
    """Return the number of training images of each class, [K], as `Rule` defines it."""
    share = np.sqrt(np.asarray(frequencies, dtype=np.float64) / max(frequencies))
    return np.maximum(np.round(rule.largest * share), rule.smallest).astype(np.int64)


def plan_training(counts: np.ndarray, class_faces: ClassFaces, seed: int) -> Plan:
    """Choose a face and a deformation for each training image.

    Args:
        counts: images of each class, [K].
        class_faces: for each class, the indices of the faces that draw it, by family.
        seed: the seed of all choices.
    """
    rng = np.random.default_rng(seed)
    faces: list[int] = []
    for count, families in zip(counts.tolist(), class_faces, strict=True):
        order = rng.permutation(len(families))  # a class of few images has as many different families
        choices = [list(families.values())[i] for i in order]
        uniforms = rng.random(count)
        for image, uniform in enumerate(uniforms.tolist()):
            choice = choices[image % len(choices)]
            faces.append(choice[int(uniform * len(choice))])
    labels = np.repeat(np.arange(len(counts)), counts)
    shape = (len(labels), len(VARIATION_LOW))
    return Plan(labels, np.array(faces), rng.uniform(VARIATION_LOW, VARIATION_HIGH, shape))


def plan_evaluation(class_faces: ClassFaces) -> Plan:
    """Plan one undeformed image per class and family, with the family's first face that draws the class."""
    pairs = [(k, faces[0]) for k, families in enumerate(class_faces) for faces in families.values()]
    labels, faces = np.array(pairs, dtype=np.int64).T
    return Plan(labels, faces, np.zeros((len(labels), len(VARIATION_LOW))))
