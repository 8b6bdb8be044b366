"""CIFAR-10 and CIFAR-100 from the original binary files; features, names and versions are those of TFDS."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from simplest_vit.data.builders.base import Archive, Builder, Content, Example, group
from simplest_vit.data.decode import encode_png
from simplest_vit.errors import UserError

EXAMPLES = {"train": 50_000, "test": 10_000}
# A record is one byte for each label, then the pixels, channel by channel. The values are the file of a
# label's names and their number.
_Labels = dict[str, tuple[str, int]]


def _read(labels: _Labels, files: dict[str, list[str]], archive: Archive, folder: Path) -> Content:
    members = archive.read(folder, [*files["test"], *files["train"], *(file for file, _ in labels.values())])
    features = {"id": tfds.features.Text(), "image": tfds.features.Image(shape=(32, 32, 3))}
    for label, (file, count) in labels.items():
        path, content = members[file]
        names = content.decode(errors="replace").split()
        if len(names) != count:
            raise UserError(f"{path}: {len(names)} class names, expected {count}; unpack {archive.url} again")
        features[label] = tfds.features.ClassLabel(names=names)

    def examples(split: str) -> Iterator[Example]:
        parts = [
            _records(*members[file], EXAMPLES[split] // len(files[split]), labels, archive) for file in files[split]
        ]
        for index, record in enumerate(np.concatenate(parts)):
            pixels = record[len(labels) :].reshape(3, 32, 32).transpose(1, 2, 0)
            values = dict(zip(labels, record.tolist(), strict=False))
            name = f"{split}_{index:05d}"
            yield Example(name, record.size, functools.partial(encode_png, pixels), {"id": name, **values})

    return Content(features, group({split: list(examples(split)) for split in EXAMPLES}))


def _records(path: str, content: bytes, examples: int, labels: _Labels, archive: Archive) -> np.ndarray:
    """Return the records of a file, uint8 [examples, record size]."""
    size = examples * (len(labels) + 3 * 32 * 32)
    if len(content) != size:
        raise UserError(f"{path}: {len(content):,} bytes, expected {size:,}; unpack {archive.url} again")
    records = np.frombuffer(content, np.uint8).reshape(examples, -1)
    for (label, (_, count)), values in zip(labels.items(), records.T, strict=False):
        if values.max() >= count:
            raise UserError(f"{path}: {label} {values.max()} is not below {count}; unpack {archive.url} again")
    return records


_ARCHIVE_10 = Archive(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    size=170_052_171,
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    folder="cifar-10-batches-bin",
)
_FILES_10 = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
CIFAR10 = Builder(
    name="cifar10",
    version="3.0.2",
    description="60,000 colour images of 32 x 32 pixels in 10 classes, 50,000 to train and 10,000 to test.",
    image_shape=(32, 32, 3),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),  # the mean over images of each image's deviation
    read=functools.partial(_read, {"label": ("batches.meta.txt", 10)}, _FILES_10, _ARCHIVE_10),
    archive=_ARCHIVE_10,
)
_ARCHIVE_100 = Archive(
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    size=168_513_733,
    sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    folder="cifar-100-binary",
)
_LABELS_100 = {"coarse_label": ("coarse_label_names.txt", 20), "label": ("fine_label_names.txt", 100)}
CIFAR100 = dataclasses.replace(
    CIFAR10,
    name="cifar100",
    description="60,000 colour images of 32 x 32 pixels in 100 classes, 50,000 to train and 10,000 to test.",
    mean=(0.5071, 0.4867, 0.4408),
    std=(0.2675, 0.2565, 0.2761),
    read=functools.partial(_read, _LABELS_100, {"train": ["train.bin"], "test": ["test.bin"]}, _ARCHIVE_100),
    archive=_ARCHIVE_100,
)
