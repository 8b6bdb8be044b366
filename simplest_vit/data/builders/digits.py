"""Scikit-learn's handwritten digits, which come with the package."""

import functools
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from simplest_vit.data.builders.base import Builder, Content, Example, group
from simplest_vit.data.decode import encode_png


def _read(folder: Path) -> Content:
    """Read scikit-learn's own file; the values 0..16 become 0..255, rounded.

    scikit-learn defines no split. Here the examples are sorted by class (stably), and every fifth one, from the first
    on, is for validation.
    """
    from sklearn.datasets import load_digits  # a second to import, needed only here

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    validation = np.zeros(len(images), bool)
    validation[np.argsort(digits.target, kind="stable")[::5]] = True

    def examples(which: np.ndarray) -> list[Example]:
        pairs = zip(images[which], digits.target[which].tolist(), strict=True)
        return [
            Example(f"digit {i}", image.size, functools.partial(encode_png, image), {"label": label})
            for i, (image, label) in enumerate(pairs)
        ]

    features = {"image": tfds.features.Image(shape=(8, 8, 1)), "label": tfds.features.ClassLabel(num_classes=10)}
    return Content(features, group({"train": examples(~validation), "validation": examples(validation)}))


DIGITS = Builder(
    name="digits",
    version="1.0.0",
    description="1,797 grey images of 8 x 8 pixels in 10 classes, 1,437 to train and 360 to validate.",
    image_shape=(8, 8, 1),
    mean=(0.3058,),  # measured on this training split
    std=(0.3761,),
    read=_read,
)
