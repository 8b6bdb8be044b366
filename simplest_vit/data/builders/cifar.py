"""CIFAR-10 and CIFAR-100 from the original binary files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from simplest_vit.data.builders.originals import Archive, Originals
from simplest_vit.data.decode import encode_png
from simplest_vit.errors import UserError

_PIXELS = 3 * 32 * 32


class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """60,000 colour images of 32 x 32 pixels in 10 classes, 50,000 to train and 10,000 to test.

    Features, names and version are those of TFDS's own builder, which needs TensorFlow.
    """

    VERSION = tfds.core.Version("3.0.2")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The archive of `ARCHIVE`, or the folder it unpacks to."
    ARCHIVE = Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        size=170_052_171,
        sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        folder="cifar-10-batches-bin",
    )
    # A record is one byte for each of these labels, then the pixels, channel by channel.
    LABELS: ClassVar[dict[str, str]] = {"label": "batches.meta.txt"}
    NUM_CLASSES: ClassVar[dict[str, int]] = {"label": 10}
    FILES: ClassVar[dict[str, list[str]]] = {
        "train": [f"data_batch_{i}.bin" for i in range(1, 6)],
        "test": ["test_batch.bin"],
    }
    EXAMPLES_PER_FILE: ClassVar[dict[str, int]] = {"train": 10_000, "test": 10_000}

    def _info(self) -> tfds.core.DatasetInfo:
        labels = {label: tfds.features.ClassLabel(num_classes=n) for label, n in self.NUM_CLASSES.items()}
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(32, 32, 3)),
                    **labels,
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        originals = Originals(Path(dl_manager.manual_dir), self.ARCHIVE, self.FILES["test"][0])
        for label, file in self.LABELS.items():
            path, text = originals.read(file)
            names = text.decode(errors="replace").split()
            if len(names) != self.NUM_CLASSES[label]:
                raise UserError(
                    f"{path}: {len(names)} class names, expected {self.NUM_CLASSES[label]}; "
                    f"unpack {self.ARCHIVE.url} again"
                )
            self.info.features[label].names = names
        return {split: self._generate_examples(split, originals) for split in self.FILES}

    def _generate_examples(self, split: str, originals: Originals) -> Iterator[tuple[int, dict[str, Any]]]:
        index = 0
        for file in self.FILES[split]:
            path, content = originals.read(file)
            size = self.EXAMPLES_PER_FILE[split] * (len(self.LABELS) + _PIXELS)
            if len(content) != size:
                raise UserError(f"{path}: {len(content):,} bytes, expected {size:,}; unpack {self.ARCHIVE.url} again")
            records = np.frombuffer(content, np.uint8).reshape(-1, len(self.LABELS) + _PIXELS)
            for record in records:
                labels = dict(zip(self.LABELS, record[: len(self.LABELS)].tolist(), strict=True))
                for label, value in labels.items():
                    if value >= self.NUM_CLASSES[label]:
                        raise UserError(
                            f"{path}: {label} {value} of image {index} is not below "
                            f"{self.NUM_CLASSES[label]}; unpack {self.ARCHIVE.url} again"
                        )
                image = record[len(self.LABELS) :].reshape(3, 32, 32).transpose(1, 2, 0)
                yield (
                    index,
                    {"id": f"{split}_{index:05d}", "image": encode_png(np.ascontiguousarray(image))} | labels,
                )
                index += 1


class Cifar100(Cifar10, skip_registration=True):  # type: ignore[call-arg]
    """60,000 colour images of 32 x 32 pixels in 100 classes of 20 kinds, 50,000 to train and 10,000 to test."""

    VERSION = tfds.core.Version("3.0.2")
    ARCHIVE = Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        size=168_513_733,
        sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        folder="cifar-100-binary",
    )
    LABELS: ClassVar[dict[str, str]] = {
        "coarse_label": "coarse_label_names.txt",
        "label": "fine_label_names.txt",
    }
    NUM_CLASSES: ClassVar[dict[str, int]] = {"coarse_label": 20, "label": 100}
    FILES: ClassVar[dict[str, list[str]]] = {"train": ["train.bin"], "test": ["test.bin"]}
    EXAMPLES_PER_FILE: ClassVar[dict[str, int]] = {"train": 50_000, "test": 10_000}
