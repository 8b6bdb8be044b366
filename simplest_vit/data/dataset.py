"""A prepared data set, loaded: what a model needs to know of it, and where its examples are."""

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import tensorflow_datasets as tfds

from simplest_vit.data.decode import eval_image
from simplest_vit.data.prepare import prepare
from simplest_vit.errors import UserError

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A split on the device: images uint8 [N, H, W, C] and labels int32 [N]."""

    images: jax.Array
    labels: jax.Array


@dataclasses.dataclass(frozen=True)
class Source:
    """A split on disk, read at random: a sequence of dicts with the bytes of an image file and a label.

    Attributes:
      examples: the sequence, from TFDS.
      label: the feature that is the label.
      name: the feature that names an image, or None.
    """

    examples: Sequence[dict[str, Any]]
    label: str
    name: str | None

    def __len__(self) -> int:
        return len(self.examples)

    def read(self, indices: Sequence[int]) -> list[tuple[bytes, int, str]]:
        """Returns (image file, label, name) for each index."""
        examples = self.examples.__getitems__(indices)  # type: ignore[attr-defined]
        return [(e["image"], int(e[self.label]), self._name(i, e)) for i, e in zip(indices, examples, strict=True)]

    def _name(self, index: int, example: dict[str, Any]) -> str:
        name = example[self.name] if self.name else b""
        return f"example {index} {name.decode() if isinstance(name, bytes) else name}".strip()


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What a run must know of its data, and remembers in its folder.

    Attributes:
      name: Its name.
      version: Of the prepared data set, such as "3.0.2".
      train_size: Number of training examples.
      validation_size: Number of validation examples.
      class_names: Names of the classes, in the order of the labels.
      image_shape: (H, W, C) of a preprocessed image.
      mean: Per channel, of pixels in [0, 1].
      std: Per channel, of pixels in [0, 1].
      fingerprint: Of the prepared files; the same for every copy of them.
    """

    name: str
    version: str
    train_size: int
    validation_size: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def to_json(self) -> dict[str, Any]:
        """Plain values, equal to what a JSON file of them gives back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(DatasetInfo)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any], path: Path) -> "DatasetInfo":
        """Read what `to_json` made.

        Args:
          values: The content of a JSON file.
          path: That file, for messages.

        Raises:
          UserError: If a field is missing, unknown or damaged.
        """

        def fail(name: str, problem: str) -> NoReturn:
            raise UserError(f"{path}: {name}: {problem}; the file is damaged: restore it, or choose another --workdir")

        def check(name: str, allowed: bool, expected: str) -> None:
            if not allowed:
                fail(name, f"{values[name]!r}, expected {expected}"[:200])

        def several(name: str, kinds: type | tuple[type, ...], length: int | None = None) -> bool:
            value = values[name]
            return (
                isinstance(value, list)
                and len(value) == (len(value) or 1 if length is None else length)
                and all(isinstance(item, kinds) and not isinstance(item, bool) for item in value)
            )

        names = {field.name for field in dataclasses.fields(cls)}
        for name in sorted(names ^ values.keys()):
            fail(name, "missing" if name in names else "unknown")
        for name in ("name", "version", "fingerprint"):
            check(name, isinstance(values[name], str), "a text")
        for name in ("train_size", "validation_size"):
            check(name, type(values[name]) is int and values[name] > 0, "a positive integer")
        check("class_names", several("class_names", str), "a list of texts")
        check("image_shape", several("image_shape", int, 3) and min(values["image_shape"]) > 0, "[H, W, C]")
        for name in ("mean", "std"):
            channels = values["image_shape"][2]
            check(name, several(name, (int, float), channels), f"a list of {channels} numbers")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Dataset(DatasetInfo):
    """A loaded data set.

    Attributes:
      train: The training split, on the device or on disk.
      validation: The validation split, likewise.
    """

    train: Arrays | Source
    validation: Arrays | Source

    @property
    def info(self) -> DatasetInfo:
        """What is known of the data set, without its examples."""
        return DatasetInfo(*(getattr(self, field.name) for field in dataclasses.fields(DatasetInfo)))


# Mean and deviation of the pixels, per channel, as the field uses them (CIFAR-10's deviations are the mean of each
# image's own). For digits: those of this project's training split. For image folders: ImageNet's.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "digits": ((0.3058,), (0.3761,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "tiny_imagenet": ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
    "imagenet": _IMAGENET,
    "image_folder": _IMAGENET,
}

# (H, W, C) of the images; where they have no common size, what they are resized to.
_IMAGE_SHAPES = {
    "digits": (8, 8, 1),
    "cifar10": (32, 32, 3),
    "cifar100": (32, 32, 3),
    "tiny_imagenet": (64, 64, 3),
    "imagenet": (224, 224, 3),
    "image_folder": (224, 224, 3),
}


def image_shape(data: Any) -> tuple[int, int, int]:
    """Returns (H, W, C) of a preprocessed image, which is known before the data set is there.

    Args:
      data: `config.data`.
    """
    height, width, channels = _IMAGE_SHAPES[data.name]
    return (data.image_size or height, data.image_size or width, channels)


def load(data: Any) -> Dataset:
    """Loads a data set, and prepares it first where that has not been done.

    It goes onto the device if its images, uint8 of the size that training takes, fit the budget and are not to be
    cropped at random from their original size. Otherwise it stays on disk.

    Args:
      data: `config.data`.

    Returns:
      The data set.

    Raises:
      UserError: it cannot be prepared or read, or an image is damaged.
    """
    path = prepare(data.name, data.dir, data.manual_dir).data_path
    builder = tfds.builder_from_directory(path)  # which worker processes can open, too
    label = {"fine": "label", "coarse": "coarse_label"}.get(data.label, "")
    features = builder.info.features
    if label not in features:
        expected = "fine or coarse" if "coarse_label" in features else "fine"
        raise UserError(f"data.label={data.label}: expected {expected} for {data.name}")
    train, validation = (_open(builder, split, label) for split in ("train", _validation_split(builder)))
    shape = image_shape(data)
    num_bytes = (len(train) + len(validation)) * int(np.prod(shape))
    budget = data.device_budget_bytes
    where = f"{data.name}: {len(train):,} + {len(validation):,} images of {'x'.join(map(str, shape))}"
    splits: tuple[Arrays | Source, Arrays | Source]
    if data.random_resized_crop:
        _LOG.info("%s, streamed from disk (data.random_resized_crop)", where)
        splits = train, validation
    elif num_bytes > budget:
        _LOG.info("%s, %.3g GB > data.device_budget_bytes=%.3g GB: streamed", where, num_bytes / 1e9, budget / 1e9)
        splits = train, validation
    else:
        _LOG.info("%s, %.3g GB on the device", where, num_bytes / 1e9)
        splits = _to_device(data.name, train, shape), _to_device(data.name, validation, shape)
    mean, std = _STATISTICS[data.name]
    return Dataset(
        name=data.name,
        version=str(builder.version),
        class_names=tuple(features[label].names),
        image_shape=shape,
        train_size=len(train),
        validation_size=len(validation),
        mean=mean,
        std=std,
        fingerprint=_fingerprint(builder),
        train=splits[0],
        validation=splits[1],
    )


def _fingerprint(builder: tfds.core.DatasetBuilder) -> str:
    """A digest of a prepared data set's features, class names, sizes and file names; the examples are not read."""
    digest = hashlib.sha256()
    for name, split in sorted(builder.info.splits.items()):
        digest.update(f"{name} {split.num_bytes} {split.shard_lengths}\n".encode())
    for path in sorted(Path(builder.data_path).iterdir()):
        if ".array_record-" in path.name:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        elif path.name == "features.json" or path.name.endswith(".labels.txt"):
            digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _validation_split(builder: tfds.core.DatasetBuilder) -> str:
    return "validation" if "validation" in builder.info.splits else "test"


def _open(builder: tfds.core.DatasetBuilder, split: str, label: str) -> Source:
    """Opens a split for reading at random."""
    name = next((name for name in ("id", "file_name", "image/filename") if name in builder.info.features), None)
    decoders = {"image": tfds.decode.SkipDecoding()}
    try:
        return Source(builder.as_data_source(split, decoders=decoders), label, name)
    except NotImplementedError as error:
        raise UserError(
            f"{builder.data_path}: prepared as {builder.info.file_format.value}, expected array_record; move it away "
            f"to prepare it anew, or: tfds convert_format --dataset_dir={builder.data_path} "
            "--out_file_format=array_record"
        ) from error


def _to_device(name: str, source: Source, shape: tuple[int, int, int]) -> Arrays:
    """Decodes a split; the copy in the host's memory lives only until the device has its own."""
    images = np.empty((len(source), *shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    for start in range(0, len(source), 1024):
        indices = list(range(start, min(start + 1024, len(source))))
        for i, (content, label, image_name) in zip(indices, source.read(indices), strict=True):
            try:
                images[i] = eval_image(content, shape, random_resized_crop=False)
            except UserError as error:
                raise UserError(f"{name}: {image_name}: {error}; repair it and prepare the data set anew") from error
            labels[i] = label
    return Arrays(jax.device_put(images), jax.device_put(labels))
