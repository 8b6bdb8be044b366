"""Load a data set: the facts that a run needs, and the examples, on the device or on disk."""

import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import host_local_array_to_global_array
from jax.sharding import Mesh, PartitionSpec

from simplest_vit.data.builders import find_builder
from simplest_vit.data.decode import eval_image
from simplest_vit.data.prepare import open_prepared, prepare
from simplest_vit.data.prepared import Prepared, Split
from simplest_vit.data.records import DiskSplit
from simplest_vit.errors import UserError
from simplest_vit.primary import broadcast_from_primary, require_same
from simplest_vit.ranges import TEXT, Values, integer, number

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class InMemorySplit:
    """A split on the device, or whole on every device of a mesh."""

    images: jax.Array  # uint8 [N, H, W, C]
    labels: jax.Array  # int32 [N]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The facts about a data set that a run needs, kept in the run's folder as `dataset.json`."""

    name: str
    version: str  # of the prepared data set, such as "3.0.2"
    description: str  # one line; for an image folder it says how the splits were made
    train_split: str  # in TFDS's syntax; so is `validation_split`
    validation_split: str
    train_size: int
    validation_size: int
    class_names: tuple[str, ...]  # in the order of the labels
    image_shape: tuple[int, int, int]  # (H, W, C) of a preprocessed image
    eval_resize: int  # pixels of the shorter side before evaluation crops the centre, at least H
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]  # standard deviation, likewise
    fingerprint: str  # a digest of all labels and image files

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    def to_json(self) -> dict[str, Any]:
        """Return plain values that survive a round trip through JSON unchanged."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any], path: Path) -> "DatasetInfo":
        """Read the values that `to_json` returned; `path` is the file, for messages.

        Raises:
          UserError: If a field is missing, unknown or damaged.
        """

        def list_of(values: Values, length: int | None = None) -> Callable[[Any], bool]:
            return lambda v: isinstance(v, list) and 0 < len(v) == (length or len(v)) and all(map(values.allows, v))

        shape: Any = values.get("image_shape")
        channels = shape[2] if list_of(integer(1), 3)(shape) and math.prod(shape) < 2**31 else 0
        allows = dict.fromkeys((field.name for field in dataclasses.fields(cls)), TEXT.allows) | {
            "class_names": list_of(TEXT),
            "image_shape": lambda _: channels,
            "mean": list_of(number("(-1e6, 1e6)"), channels),
            "std": list_of(number("(0, 1e6)"), channels),
            **dict.fromkeys(("train_size", "validation_size", "eval_resize"), integer(1).allows),
        }
        for name in sorted(allows.keys() | values.keys()):
            found = f"{values[name]!r}"[:100] if name in values else "missing"
            if found == "missing" or name not in allows or not allows[name](values[name]):
                raise UserError(f"{path}: {name} is not valid ({found}); restore the file, or choose another --workdir")
        own: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**own)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset(DatasetInfo):
    """A loaded data set; each split is on the device or on disk."""

    train: InMemorySplit | DiskSplit
    validation: InMemorySplit | DiskSplit
    num_workers: int | None  # processes that decode a split on disk; 0 for threads, None for one per core

    @property
    def info(self) -> DatasetInfo:
        """The facts about the data set, without its examples."""
        return DatasetInfo(**{field.name: getattr(self, field.name) for field in dataclasses.fields(DatasetInfo)})


def image_shape(data: Any) -> tuple[int, int, int]:
    """Return the (H, W, C) of a preprocessed image; a data set with a builder need not be prepared.

    Raises:
      UserError: If there is no builder and TFDS has not prepared the data set.
    """
    builder = find_builder(data.name)
    height, width, channels = (builder or open_prepared(data.name, data.dir)).image_shape
    return (data.image_size or height, data.image_size or width, channels)


def load(data: Any, *, mesh: Mesh | None = None, only_validation: bool = False) -> Dataset:
    """Load a data set; prepare it first if necessary.

    A split is put on the device if its images, as uint8 of the size used in training, fit in the budget, unless they
    are to be cropped at random from their original size. Otherwise it stays on disk.

    Args:
      data: `config.data`.
      mesh: The devices of the run, of all processes; None for one device.
      only_validation: Load the validation split in place of the training split as well, for evaluation only.

    Raises:
      UserError: If the data set cannot be prepared or is damaged, or if the splits do not match.
    """
    prepared = _prepare_once(data)
    label = prepared.label_feature(data.label)
    if data.name == "image_folder" and not data.validation_split and "validation" not in prepared.info.splits:
        raise UserError(
            f"config.data.manual_dir={data.manual_dir}: no class has a second image, which validation needs; add "
            "images, or sort them into train/CLASS/ and val/CLASS/"
        )
    held_out = "validation" if "validation" in prepared.info.splits else "test"
    validation = prepared.split("config.data.validation_split", data.validation_split or held_out, label)
    train = validation if only_validation else prepared.split("config.data.train_split", data.train_split, label)
    class_names = tuple(prepared.info.features[label].names)
    if not only_validation:
        _check_splits(train, validation, prepared.classes(label), class_names)
    shape = image_shape(data)
    info = DatasetInfo(
        name=data.name,
        version=str(prepared.info.version),
        description=(prepared.info.description or "").strip().partition("\n")[0],
        train_split=train.spec,
        validation_split=validation.spec,
        train_size=len(train.labels),
        validation_size=len(validation.labels),
        class_names=class_names,
        image_shape=shape,
        # For ImageNet, resize to 256 and crop 224. Images that are not cropped in training are not cropped here either.
        eval_resize=round(shape[0] * 256 / 224) if data.random_resized_crop else shape[0],
        mean=prepared.mean,
        std=prepared.std,
        fingerprint=prepared.fingerprint,
    )
    require_same({f"the data's {name}": value for name, value in info.to_json().items()})
    _LOG.info("%s in %s: %s", info.name, prepared.folder, info.description)
    _LOG.info("%s: %s", label, prepared.class_line(label))
    loaded = load_split(validation, info, data.device_budget_bytes, mesh)
    stream = data.random_resized_crop
    return Dataset(
        **vars(info),
        train=loaded if only_validation else load_split(train, info, data.device_budget_bytes, mesh, stream=stream),
        validation=loaded,
        num_workers=data.num_workers,
    )


def _prepare_once(data: Any) -> Prepared:
    """Prepare a data set in process 0 while the others wait.

    Afterwards the others open it, or prepare their own copy if they do not share its disk.
    """
    prepared: list[Prepared] = []
    broadcast_from_primary(lambda: prepared.append(prepare(data.name, data.dir, data.manual_dir)))
    return prepared[0] if prepared else prepare(data.name, data.dir, data.manual_dir)


def _check_splits(train: Split, validation: Split, classes: np.ndarray, class_names: tuple[str, ...]) -> None:
    """Raise a UserError if the splits share examples, or if `train` lacks a class that occurs in the data set."""
    for name, start, stop in train.intervals:
        for other, first, last in validation.intervals:
            if name == other and (shared := min(stop, last) - max(start, first)) > 0:
                raise UserError(
                    f"{train.field}={train.spec} and {validation.field}={validation.spec} share {shared:,} examples; "
                    "choose parts that do not overlap, such as train[:90%] and train[90%:]"
                )
    missing = [class_names[k] for k in np.setdiff1d(classes, train.labels)]
    if missing:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(
            f"{train.field}={train.spec} has no example of {len(missing)} of the {len(class_names)} classes ({some}); "
            "choose a larger part"
        )


def load_split(
    split: Split, info: DatasetInfo, budget: int, mesh: Mesh | None = None, *, stream: bool = False
) -> InMemorySplit | DiskSplit:
    """Load a split if its images fit in the budget in bytes, unless `stream` keeps it on disk.

    Every device of the mesh gets the whole split, so that each samples its part of a batch without communication.
    """
    shape, num_bytes = (len(split.labels), *info.image_shape), len(split.labels) * math.prod(info.image_shape)
    what = f"{info.name}, {split.spec}: {len(split.labels):,} images of {'x'.join(map(str, info.image_shape))}"
    if stream:
        _LOG.info("%s, streamed from disk (data.random_resized_crop)", what)
        return split.disk
    if num_bytes > budget:
        _LOG.info("%s, %.3g GB > data.device_budget_bytes=%.3g GB: streamed", what, num_bytes / 1e9, budget / 1e9)
        return split.disk
    _LOG.info("%s, %s MB on the device", what, f"{num_bytes / 1e6:,.2f}")
    if split.pixels and split.pixel_shape == info.image_shape and info.eval_resize == info.image_shape[0]:
        images = split.pixels()
    else:
        images = np.empty(shape, np.uint8)

        def decode(part: range) -> None:
            chunk = split.disk.decode(part, lambda file, _: eval_image(file, info.image_shape, info.eval_resize))
            images[part.start : part.stop] = chunk["image"]

        for _ in split.disk.map(decode, f"decoding {info.name}, {split.spec}"):
            pass
    arrays = images, split.labels  # the copy in host memory is freed as soon as the devices have theirs
    if mesh is None:
        return InMemorySplit(*jax.device_put(arrays))
    return InMemorySplit(*host_local_array_to_global_array(arrays, mesh, PartitionSpec()))
