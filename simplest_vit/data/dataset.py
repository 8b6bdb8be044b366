"""A prepared data set, loaded: what a model needs to know of it, and where its examples are."""

import contextlib
import dataclasses
import hashlib
import itertools
import logging
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorflow_datasets as tfds
from jax.sharding import Mesh

from simplest_vit import preemption
from simplest_vit.data.builders import builder_of
from simplest_vit.data.decode import eval_image
from simplest_vit.data.prepare import damaged, prepare
from simplest_vit.data.progress import Progress
from simplest_vit.errors import UserError

_LOG = logging.getLogger(__name__)
_LOADED = itertools.count()  # data sets, alike in all processes
_CHUNK = 256  # images that a core decodes at a time


@dataclasses.dataclass(frozen=True)
class InMemorySplit:
    """A split on the device.

    Attributes:
      images: uint8 [N, H, W, C].
      labels: int32 [N].
      copies: The split on every device of a mesh, for each mesh that has asked.
    """

    images: jax.Array
    labels: jax.Array
    copies: "dict[Mesh, InMemorySplit]" = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class DiskSplit:
    """A split on disk, read at random.

    Attributes:
      examples: From TFDS: a sequence of dicts with the bytes of an image file and a label.
      label: The feature that is the label.
      shards: For each file of the split its path and the number of its examples, in their order.
    """

    examples: Sequence[dict[str, Any]]
    label: str
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
            return [(e["image"], int(e[self.label]), _name(i, e)) for i, e in zip(indices, examples, strict=True)]
        except Exception as error:  # array_record's, which seldom names the file
            path = self._damaged(indices)
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: damaged ({reason}); remove {path.parent} to prepare it anew") from error

    def decode(self, indices: Sequence[int], to_pixels: Callable[[bytes, int], np.ndarray]) -> dict[str, np.ndarray]:
        """Read image uint8 [n, H, W, C] and label int32 [n].

        Args:
          indices: Which n examples.
          to_pixels: From an image file and its place in `indices` to pixels.

        Raises:
          UserError: If an image or a file of the data set is damaged.
        """
        images, labels = [], []
        for i, (content, label, name) in enumerate(self.read(indices)):
            try:
                images.append(to_pixels(content, i))
            except UserError as error:
                raise UserError(f"{name}: {error}; repair it and prepare the data set anew") from error
            labels.append(label)
        return {"image": np.stack(images), "label": np.array(labels, np.int32)}

    def _damaged(self, indices: Sequence[int]) -> Path:
        """The file of the first example that cannot be read alone."""
        for index in indices:
            try:
                int(self.examples[index][self.label])  # a record that cannot be read may be an empty one, not an error
            except Exception:
                break
        ends = np.cumsum([size for _, size in self.shards])
        return self.shards[int(np.searchsorted(ends, index, side="right"))][0]


def _name(index: int, example: dict[str, Any]) -> str:
    name = next((example[feature] for feature in ("id", "file_name", "image/filename") if feature in example), b"")
    return f"example {index} {name.decode(errors='replace')}".strip()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What a run must know of its data, and remembers in its folder.

    Attributes:
      version: Of the prepared data set, such as "3.0.2".
      train_size: Number of training examples.
      class_names: In the order of the labels.
      image_shape: (H, W, C) of a preprocessed image.
      eval_resize: Pixels of the shorter side before evaluation crops the centre, at least H.
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
    eval_resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def to_json(self) -> dict[str, Any]:
        """Plain values, equal to what a JSON file of them gives back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any], path: Path) -> "DatasetInfo":
        """Read what `to_json` made; `path` is where it was.

        Raises:
          UserError: If a field is missing, unknown or damaged.
        """

        def fail(name: str, problem: str) -> NoReturn:
            raise UserError(f"{path}: {name}: {problem}; the file is damaged: restore it, or choose another --workdir")

        def of(*kinds: type) -> Callable[[Any], bool]:
            return lambda value: isinstance(value, list) and bool(value) and all(type(item) in kinds for item in value)

        text = (lambda value: isinstance(value, str), "a text")
        size = (lambda value: type(value) is int and value > 0, "a positive integer")
        each = (lambda value: of(int, float)(value) and len(value) == values["image_shape"][2], "a number a channel")
        expected = {
            **{
                "name": text,
                "version": text,
                "fingerprint": text,
                "train_size": size,
                "validation_size": size,
                "eval_resize": size,
            },
            "image_shape": (lambda value: of(int)(value) and len(value) == 3 and min(value) > 0, "[H, W, C]"),
            **{"class_names": (of(str), "a list of texts"), "mean": each, "std": each},
        }
        for name in sorted(expected.keys() ^ values.keys()):
            fail(name, "missing" if name in expected else "unknown")
        for name, (allows, what) in expected.items():
            if not allows(values[name]):
                fail(name, f"{values[name]!r}"[:100] + f", expected {what}")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset(DatasetInfo):
    """A loaded data set, of which each split is on the device or on disk.

    Attributes:
      num_workers: Processes that decode a split on disk; 0 for threads, None for one a core.
    """

    train: InMemorySplit | DiskSplit
    validation: InMemorySplit | DiskSplit
    num_workers: int | None

    @property
    def info(self) -> DatasetInfo:
        """What is known of the data set, without its examples."""
        return DatasetInfo(**{field.name: getattr(self, field.name) for field in dataclasses.fields(DatasetInfo)})


def image_shape(data: Any) -> tuple[int, int, int]:
    """(H, W, C) of a preprocessed image, by `config.data`, which is known before the data set is there."""
    height, width, channels = builder_of(data.name).image_shape
    return (data.image_size or height, data.image_size or width, channels)


def load(data: Any) -> Dataset:
    """Load a data set, and prepare it first where that has not been done.

    A split goes onto the device if its images, uint8 of the size that training takes, fit the budget, and for training
    are not to be cropped at random from their original size. Otherwise it stays on disk.

    Args:
      data: `config.data`.

    Raises:
      UserError: If it cannot be prepared or read, or an image is damaged.
    """
    builder = _prepare_once(data)
    features = builder.info.features
    label = "coarse_label" if data.label == "coarse" else "label"
    try:
        class_names = tuple(features[label].names)
        train = _open(builder, data.train_split, label)
        held_out = "validation" if "validation" in builder.info.splits else "test"
        validation = _open(builder, data.validation_split or held_out, label)
    except UserError:
        raise
    except Exception as error:
        raise damaged(Path(builder.data_path), error) from error
    shape = image_shape(data)
    # ImageNet resizes to 256 for a crop of 224; images that are trained on whole are also evaluated whole.
    eval_resize = round(shape[0] * 256 / 224) if data.random_resized_crop else shape[0]
    info = DatasetInfo(
        name=data.name,
        version=str(builder.version),
        train_size=len(train),
        validation_size=len(validation),
        class_names=class_names,
        image_shape=shape,
        eval_resize=eval_resize,
        mean=builder_of(data.name).mean,
        std=builder_of(data.name).std,
        fingerprint=_fingerprint(builder),
    )
    return Dataset(
        **vars(info),
        train=load_split("train", train, info, data),
        validation=load_split("validation", validation, info, data),
        num_workers=data.num_workers,
    )


def _prepare_once(data: Any) -> tfds.core.DatasetBuilder:
    """Prepare a data set in process 0, while the others wait.

    Then they see it, or where they do not share its disk, prepare it for themselves.
    """
    several, key = jax.process_count() > 1, f"simplest_vit/prepared/{next(_LOADED)}"
    client: Any = ocp.multihost.get_jax_distributed_client() if several else None
    while several and jax.process_index() > 0:
        preemption.check()  # it may take hours
        try:
            if error := client.blocking_key_value_get(key, 1000):
                raise UserError(error)
            break
        except jax.errors.JaxRuntimeError as problem:
            if "DEADLINE_EXCEEDED" not in str(problem):
                raise
    error = ""
    try:
        return prepare(data.name, data.dir, data.manual_dir)
    except BaseException as problem:  # whatever it is, the others must not wait, nor take the data for ready
        error = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise
    finally:
        if several and jax.process_index() == 0:
            client.key_value_set(key, error)


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


def _open(builder: tfds.core.DatasetBuilder, split: str, label: str) -> DiskSplit:
    """Open a split for reading at random."""
    try:
        examples = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise UserError(
            f"{builder.data_path}: prepared as {builder.info.file_format.value}, expected array_record; move it away "
            f"to prepare it anew, or: tfds convert_format --dataset_dir={builder.data_path} "
            "--out_file_format=array_record"
        ) from error
    shards = builder.info.splits[split].file_instructions
    return DiskSplit(examples, label, tuple((Path(shard.filename), shard.examples_in_shard) for shard in shards))


def load_split(split: str, source: DiskSplit, info: DatasetInfo, data: Any) -> InMemorySplit | DiskSplit:
    """Decode a split onto the device, on all cores, if that is wanted and it fits."""
    num_bytes, budget = len(source) * math.prod(info.image_shape), data.device_budget_bytes
    what = f"{info.name}, {split}: {len(source):,} images of {'x'.join(map(str, info.image_shape))}"
    if split == "train" and data.random_resized_crop:
        _LOG.info("%s, streamed from disk (data.random_resized_crop)", what)
        return source
    if num_bytes > budget:
        _LOG.info("%s, %.3g GB > data.device_budget_bytes=%.3g GB: streamed", what, num_bytes / 1e9, budget / 1e9)
        return source
    _LOG.info("%s, %.3g GB on the device", what, num_bytes / 1e9)
    # The copy in the host's memory lives only until the device has its own.
    images, labels = np.empty((len(source), *info.image_shape), np.uint8), np.empty(len(source), np.int32)
    parts = [range(start, min(start + _CHUNK, len(source))) for start in range(0, len(source), _CHUNK)]
    progress = Progress(f"decoding {info.name}, {split}", len(source), _LOG.info)

    def decode(part: range) -> int:
        chunk = source.decode(part, lambda content, _: eval_image(content, info.image_shape, info.eval_resize))
        images[part.start : part.stop], labels[part.start : part.stop] = chunk["image"], chunk["label"]
        return len(part)

    with ThreadPoolExecutor(cpu_count()) as pool:
        for count in pool.map(decode, parts):
            progress.add(count, count)
    return InMemorySplit(jax.device_put(images), jax.device_put(labels))


def cpu_count() -> int:
    """Count the cores that this process may use, by its affinity and by its cgroup's quota, as of a container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # "max 100000" is no quota
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, max(1, quota // period))
    return cores
