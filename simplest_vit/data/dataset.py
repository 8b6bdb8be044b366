"""A prepared data set, loaded: what a model needs to know of it, and where its examples are."""

import dataclasses
import hashlib
import itertools
import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorflow_datasets as tfds

from simplest_vit.data.decode import eval_image
from simplest_vit.data.prepare import damaged, prepare
from simplest_vit.data.progress import Progress, cores
from simplest_vit.errors import UserError

_LOG = logging.getLogger(__name__)
_LOADED = itertools.count()  # data sets, alike in all processes
_CHUNK = 256  # images that a core decodes at a time


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A split on the device: images uint8 [N, H, W, C] and labels int32 [N]."""

    images: jax.Array
    labels: jax.Array


@dataclasses.dataclass(frozen=True)
class Source:
    """A split on disk, read at random: a sequence of dicts with the bytes of an image file and a label.

    Attributes:
      examples: The sequence, from TFDS.
      label: The feature that is the label.
      name: The feature that names an image, or None.
      shards: For each file of the split its path and the number of its examples, in their order.
    """

    examples: Sequence[dict[str, Any]]
    label: str
    name: str | None
    shards: tuple[tuple[Path, int], ...]

    def __len__(self) -> int:
        return len(self.examples)

    def read(self, indices: Sequence[int]) -> list[tuple[bytes, int, str]]:
        """Read (image file, label, name) for each index.

        Raises:
          UserError: If a file of the data set is damaged.
        """
        try:
            examples = self.examples.__getitems__(indices)  # type: ignore[attr-defined]
            return [(e["image"], int(e[self.label]), self._name(i, e)) for i, e in zip(indices, examples, strict=True)]
        except Exception as error:  # array_record's, which seldom names the file
            path = self._damaged(indices)
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: damaged ({reason}); remove {path.parent} to prepare it anew") from error

    def _name(self, index: int, example: dict[str, Any]) -> str:
        name = example[self.name] if self.name else b""
        return f"example {index} {name.decode(errors='replace') if isinstance(name, bytes) else name}".strip()

    def _damaged(self, indices: Sequence[int]) -> Path:
        """The file of the first example that cannot be read alone."""
        ends = np.cumsum([size for _, size in self.shards])
        for index in indices:
            path = self.shards[int(np.searchsorted(ends, index, side="right"))][0]
            try:
                self.examples[index]
            except Exception:
                break
        return path


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
    """(H, W, C) of a preprocessed image, which is known before the data set is there.

    Args:
      data: `config.data`.
    """
    height, width, channels = _IMAGE_SHAPES[data.name]
    return (data.image_size or height, data.image_size or width, channels)


def load(data: Any) -> Dataset:
    """Load a data set, and prepare it first where that has not been done.

    A split goes onto the device if its images, uint8 of the size that training takes, fit the budget, and for training
    are not to be cropped at random from their original size. Otherwise it stays on disk.

    Args:
      data: `config.data`.

    Returns:
      The data set.

    Raises:
      UserError: If it cannot be prepared or read, or an image is damaged.
    """
    path = Path(_prepare_once(data))
    try:
        builder = tfds.builder_from_directory(path)  # which worker processes can open, too
        label = {"fine": "label", "coarse": "coarse_label"}.get(data.label, "")
        features = builder.info.features
        if label not in features:
            expected = "fine or coarse" if "coarse_label" in features else "fine"
            raise UserError(f"data.label={data.label}: expected {expected} for {data.name}")
        train = _open(builder, "train", label)
        validation = _open(builder, "validation" if "validation" in builder.info.splits else "test", label)
    except UserError:
        raise
    except Exception as error:
        raise damaged(path, error) from error
    mean, std = _STATISTICS[data.name]
    info = DatasetInfo(
        name=data.name,
        version=str(builder.version),
        train_size=len(train),
        validation_size=len(validation),
        class_names=tuple(features[label].names),
        image_shape=image_shape(data),
        mean=mean,
        std=std,
        fingerprint=_fingerprint(builder),
    )
    return Dataset(
        **vars(info),
        train=_place("train", train, info, data),
        validation=_place("validation", validation, info, data),
    )


def _prepare_once(data: Any) -> str:
    """Where the data set is prepared: process 0 does it, while the others wait.

    Then they see it, or where they do not share its disk, prepare it for themselves.
    """

    def prepare_here() -> str:
        return str(prepare(data.name, data.dir, data.manual_dir).data_path)

    if jax.process_count() == 1:
        return prepare_here()
    client, key = ocp.multihost.get_jax_distributed_client(), f"simplest_vit/prepared/{next(_LOADED)}"
    if jax.process_index() == 0:
        error = ""
        try:
            return prepare_here()
        except UserError as problem:
            error = str(problem)
            raise
        finally:
            client.key_value_set(key, error)
    while True:  # a short time each, for signals come in between; it may take hours
        try:
            error = client.blocking_key_value_get(key, 1000)
        except jax.errors.JaxRuntimeError as problem:
            if "DEADLINE_EXCEEDED" not in str(problem):
                raise
        else:
            if error:
                raise UserError(error)
            return prepare_here()


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


def _open(builder: tfds.core.DatasetBuilder, split: str, label: str) -> Source:
    """Open a split for reading at random."""
    name = next((name for name in ("id", "file_name", "image/filename") if name in builder.info.features), None)
    decoders = {"image": tfds.decode.SkipDecoding()}
    try:
        examples = builder.as_data_source(split, decoders=decoders)
    except NotImplementedError as error:
        raise UserError(
            f"{builder.data_path}: prepared as {builder.info.file_format.value}, expected array_record; move it away "
            f"to prepare it anew, or: tfds convert_format --dataset_dir={builder.data_path} "
            "--out_file_format=array_record"
        ) from error
    info = builder.info.splits[split]
    return Source(examples, label, name, tuple(zip(map(Path, info.filepaths), info.shard_lengths, strict=True)))


def _place(split: str, source: Source, info: DatasetInfo, data: Any) -> Arrays | Source:
    """Put a split on the device if that is wanted and it fits."""
    num_bytes, budget = len(source) * math.prod(info.image_shape), data.device_budget_bytes
    what = f"{info.name}, {split}: {len(source):,} images of {'x'.join(map(str, info.image_shape))}"
    if split == "train" and data.random_resized_crop:
        _LOG.info("%s, streamed from disk (data.random_resized_crop)", what)
    elif num_bytes > budget:
        _LOG.info("%s, %.3g GB > data.device_budget_bytes=%.3g GB: streamed", what, num_bytes / 1e9, budget / 1e9)
    else:
        _LOG.info("%s, %.3g GB on the device", what, num_bytes / 1e9)
        return _to_device(source, info, data.random_resized_crop, f"decoding {info.name}, {split}")
    return source


def _to_device(source: Source, info: DatasetInfo, random_resized_crop: bool, what: str) -> Arrays:
    """Decode a split on all cores; the copy in the host's memory lives only until the device has its own."""
    images = np.empty((len(source), *info.image_shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    progress = Progress(what, len(source), _LOG.info)

    def decode(start: int) -> int:
        indices = list(range(start, min(start + _CHUNK, len(source))))
        for i, (content, label, name) in zip(indices, source.read(indices), strict=True):
            try:
                images[i] = eval_image(content, info.image_shape, random_resized_crop)
            except UserError as error:
                raise UserError(f"{info.name}: {name}: {error}; repair it and prepare the data set anew") from error
            labels[i] = label
        return len(indices)

    with ThreadPoolExecutor(cores()) as pool:
        for count in pool.map(decode, range(0, len(source), _CHUNK)):
            progress.add(count, count)
    return Arrays(jax.device_put(images), jax.device_put(labels))
