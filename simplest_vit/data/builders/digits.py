"""scikit-learn's handwritten digits: real, bundled with the package, ready in a second and offline."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from simplest_vit.data.decode import encode_png


class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """1,797 grey images of 8 x 8 pixels in 10 classes, 1,437 to train and 360 to validate.

    The original values 0..16 become 0..255, rounded. scikit-learn has no split of its own; here, with the
    examples sorted by class (stably), every fifth one, from the first on, is for validation.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        from sklearn.datasets import load_digits  # a second to import, needed only here

        digits = load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        by_class = np.argsort(digits.target, kind="stable")
        validation = np.zeros(len(images), bool)
        validation[by_class[::5]] = True
        return {
            "train": self._generate_examples(images[~validation], digits.target[~validation]),
            "validation": self._generate_examples(images[validation], digits.target[validation]),
        }

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": encode_png(image), "label": int(label)}
