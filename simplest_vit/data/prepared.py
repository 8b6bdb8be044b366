"""Open a prepared data set: features found by type, splits in TFDS's syntax, and measurements made once."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import secrets
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from simplest_vit.data.decode import decode_image
from simplest_vit.data.records import DiskSplit, cannot_read
from simplest_vit.errors import UserError

_LOG = logging.getLogger(__name__)
_SIDECAR = "simplest_vit.npz"
_MAX_PIXEL_BYTES = 2_000_000_000  # decoded images up to this size are kept in the sidecar
_MAX_MEASURED = 10_000  # images of different sizes from which mean and deviation are measured
_DEFAULT_SIZE = 224  # pixels, if the images differ in size


@dataclasses.dataclass(frozen=True)
class Split:
    """A split of a prepared data set, or a part of one."""

    field: str  # the config field that names it
    spec: str  # its name in TFDS's syntax
    intervals: tuple[tuple[str, int, int], ...]  # (split, start, stop) of each part
    disk: DiskSplit
    labels: np.ndarray  # int32 [N]
    # Loads the decoded images, uint8 [N, *pixel_shape]; None if sizes differ or there are too many images.
    pixels: Callable[[], np.ndarray] | None
    pixel_shape: tuple[int, int, int] | None  # (H, W, C) of a decoded image, or None


class Prepared:
    """A data set that this project or TFDS has prepared as array_record.

    Facts that TFDS does not record are measured on first use and kept in `simplest_vit.npz` in the folder: a digest of
    all labels and image files, the labels, decoded images if they are small and of equal size, mean and deviation.

    Args:
      builder: TFDS's builder of the folder.
      mean: Per channel, of pixels in [0, 1]; None to measure mean and deviation.
      std: Likewise.

    Raises:
      UserError: If it is not an image classification set in array_record files.
    """

    def __init__(
        self,
        builder: tfds.core.DatasetBuilder,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        self.builder, self.info, self.folder = builder, builder.info, Path(builder.data_path)
        self._mean, self._std = mean, std
        file_format = builder.info.file_format.value if builder.info.file_format else "nothing"
        if file_format != "array_record":
            raise UserError(
                f"{self.folder}: prepared as {file_format}, expected array_record; convert it: "
                f"tfds convert_format --dataset_version_dir={self.folder} --out_file_format=array_record"
            )
        features = dict(sorted(builder.info.features.items()))  # TFDS's order differs between processes
        images = [name for name, feature in features.items() if type(feature) is tfds.features.Image]
        self.labels = [name for name, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
        if not self.labels or not images or (len(images) > 1 and "image" not in images):
            raise UserError(
                f"{self.folder}: {len(images)} images and {len(self.labels)} class labels in an example "
                f"({', '.join(features)}); expected one image and at least one class label"
            )
        self.image = images[0] if len(images) == 1 else "image"
        height, width, channels = features[self.image].shape
        if channels not in (None, 1, 3):
            raise UserError(f"{self.folder}: images of {channels} channels; expected 1 or 3")
        if (dtype := features[self.image].np_dtype) not in (np.uint8, np.uint16):
            raise UserError(f"{self.folder}: images of {np.dtype(dtype)}; expected uint8 or uint16")
        self._shape = (height, width, channels or 3) if height and width else None
        size = min(height or _DEFAULT_SIZE, width or _DEFAULT_SIZE)
        self.image_shape = (size, size, channels or 3)

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean per channel, of pixels in [0, 1]."""
        return self._mean or tuple(self._measured["mean"].tolist())

    @property
    def std(self) -> tuple[float, ...]:
        """The standard deviation per channel, of pixels in [0, 1]."""
        return self._std or tuple(self._measured["std"].tolist())

    @property
    def fingerprint(self) -> str:
        """A digest of class names, labels and image files; the same for every copy of the data set."""
        return str(self._measured["fingerprint"])

    def label_feature(self, name: str | None) -> str:
        """Return the feature that `data.label` chooses; a UserError unless it chooses exactly one."""
        if name is None and len(self.labels) > 1 and "label" not in self.labels:
            raise UserError(f"{self.folder} has several labels; choose: --config.data.label={'|'.join(self.labels)}")
        name = name or ("label" if "label" in self.labels else self.labels[0])
        if name not in self.labels:
            raise UserError(f"config.data.label={name}: {self.folder} has {', '.join(self.labels)}; choose one of them")
        return name

    def class_line(self, label: str) -> str:
        """Format the number and the first names of a label's classes: "2 classes: cat, dog"."""
        names = self.info.features[label].names
        return f"{len(names)} classes: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"

    def split(self, field: str, spec: str, label: str) -> Split:
        """Find a split.

        Args:
          field: The config field that names it.
          spec: Its name in TFDS's syntax, such as train[:90%].
          label: The feature to use as the label.

        Raises:
          UserError: If there is no such split, or it is empty or has examples without a label.
        """
        splits = self.info.splits
        sizes = {name: split.num_examples for name, split in splits.items()}
        try:
            found = splits[spec]
            parts = tfds.core.ReadInstruction.from_spec(spec).to_absolute(splits)
        except Exception as error:
            known = ", ".join(f"{name} ({size:,} examples)" for name, size in sizes.items())
            reason = str(error).splitlines()[-1].split(" See format")[0].split(" Should be")[0]
            raise UserError(f"{field}={spec}: {reason} Expected a part of {known}, such as train[:90%]") from error
        intervals = tuple((p.splitname, p.from_ or 0, sizes[p.splitname] if p.to is None else p.to) for p in parts)
        if not intervals or not all(start < stop for _, start, stop in intervals):
            raise UserError(f"{field}={spec}: no examples; choose a larger part of {', '.join(sizes)}")
        labels = np.concatenate([self._measured[f"{name}/{label}"][start:stop] for name, start, stop in intervals])
        if labels.min() < 0 or labels.max() >= self.info.features[label].num_classes:
            raise UserError(f"{field}={spec}: examples without a {label}; choose another split")
        disk = DiskSplit(found.file_instructions, self.image, [label])
        pixels = functools.partial(self._pixels, intervals) if bool(self._measured["has_pixels"]) else None
        return Split(field, spec, intervals, disk, labels, pixels, self._shape)

    def classes(self, label: str) -> np.ndarray:
        """Return the labels that occur in any split; TFDS's -1 for an unknown label is omitted."""
        filled = [name for name, split in self.info.splits.items() if split.num_examples]
        labels = np.concatenate([self._measured[f"{name}/{label}"] for name in filled])
        return np.unique(labels[labels >= 0])

    def _pixels(self, intervals: tuple[tuple[str, int, int], ...]) -> np.ndarray:
        """Read decoded images from the sidecar, a zip file with checksums."""
        path = self.folder / _SIDECAR
        try:
            with path.open("rb") as opened, np.load(opened) as file:
                parts = [file[f"{name}/pixels"][start:stop] for name, start, stop in intervals]
        except OSError as error:
            raise cannot_read(path, error) from error
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: damaged ({error}); remove this file to recreate it") from error
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    @functools.cached_property
    def _measured(self) -> dict[str, np.ndarray]:
        """The measurements of the data set except the decoded images."""
        path, state = self.folder / _SIDECAR, self._state()
        try:
            with path.open("rb") as opened, np.load(opened) as file:
                found = {name: file[name] for name in file.files if not name.endswith("/pixels")}
            if str(found["state"]) == state and (self._mean or "mean" in found):  # it was opened by another name
                return found
        except FileNotFoundError:
            pass
        except OSError as error:
            raise cannot_read(path, error) from error
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
            _LOG.warning("%s is damaged; recreating it", path)
        measured, pixels = self._measure()
        measured |= {"state": np.array(state), "has_pixels": np.array(bool(pixels))}
        partial = path.with_name(f".{secrets.token_hex(4)}.npz")
        try:
            np.savez(partial, **measured, **pixels)  # type: ignore[arg-type]
            partial.replace(path)
        except OSError as error:
            _LOG.warning("%s cannot be written (%s); the data set is measured at every start", path, error.strerror)
            measured["has_pixels"] = np.array(False)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        return measured

    def _measure(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Read each example once.

        Returns:
          The content of the sidecar, and for each split SPLIT/pixels, uint8 [N, H, W, C], unless there are too many.
        """
        sizes = {name: split.num_examples for name, split in sorted(self.info.splits.items())}
        keep = self._shape is not None and sum(sizes.values()) * math.prod(self._shape) <= _MAX_PIXEL_BYTES
        filled = [name for name in sizes if sizes[name]]  # array_record cannot open a split without examples
        train = min(filled, key=lambda name: name != "train")
        every = max(1, sizes[train] // _MAX_MEASURED)
        names = {label: self.info.features[label].names for label in self.labels}
        digest = hashlib.sha256(json.dumps([names, sizes]).encode())
        measured: dict[str, np.ndarray] = {}
        pixels: dict[str, np.ndarray] = {}
        hashes: dict[str, np.ndarray] = {}
        for split in filled:
            is_measured = self._mean is None and split == train
            hashed, labels, images, moments = self._measure_split(split, keep, every if is_measured else 0)
            digest.update(hashed)
            hashes[split] = np.frombuffer(hashed, np.uint8).reshape(len(labels), -1)[:, :8].copy().view(np.uint64)
            measured |= {f"{split}/{label}": labels[:, k] for k, label in enumerate(self.labels)}
            if images is not None:
                pixels[f"{split}/pixels"] = images
            if is_measured:
                mean, square = moments / len(range(0, sizes[train], every))
                measured |= {"mean": mean.round(4), "std": np.sqrt(square - mean**2).round(4)}
        for split in filled:
            if split != train and (known := np.isin(hashes[split], hashes[train]).sum()):
                _LOG.warning("%d of the %s images of %s are also in %s", known, f"{sizes[split]:,}", split, train)
        measured["fingerprint"] = np.array(digest.hexdigest())
        return measured, pixels

    def _measure_split(
        self, split: str, keep: bool, every: int
    ) -> tuple[bytes, np.ndarray, np.ndarray | None, np.ndarray]:
        """Read each example of a split once.

        Args:
          keep: Whether to decode and keep all images, which must have one size.
          every: Measure one in this many images; 0 for none.

        Returns:
          A hash of each example; labels int32 [N, labels]; images uint8 [N, H, W, C] or None; and [2, C], the sums over
          the measured images of the mean and the mean square of their pixels in [0, 1].
        """
        disk = DiskSplit(self.info.splits[split].file_instructions, self.image, self.labels)
        channels = self.image_shape[2]
        labels = np.zeros((len(disk), len(self.labels)), np.int32)
        images = np.empty((len(disk), *(self._shape or ())), np.uint8) if keep else None
        smallest = (0, 0) if self._shape else (64, 64)

        def measure(part: range) -> tuple[bytes, np.ndarray]:
            hashes, sums = [], np.zeros((2, channels))
            for index, example in zip(part, disk.read(part), strict=True):
                labels[index] = example.labels
                hashes.append(hashlib.sha256(example.image).digest() + labels[index].astype("<i4").tobytes())
                is_measured = every and index % every == 0
                if images is None and not is_measured:
                    continue
                pixels = example.decode(decode_image, channels, smallest)
                if images is not None:
                    images[index] = pixels
                if is_measured:
                    x = pixels.reshape(-1, channels) / 255
                    sums += x.mean(0), (x * x).mean(0)
            return b"".join(hashes), sums

        parts = list(disk.map(measure, f"measuring {self.info.full_name}, {split}"))
        moments = sum((sums for _, sums in parts), np.zeros((2, channels)))
        return b"".join(hashes for hashes, _ in parts), labels, images, moments

    def _state(self) -> str:
        """Digest the metadata, and name, size and time of the files, to detect an outdated sidecar.

        A set with other labels may have files of the same size. Archives store times in whole seconds.
        """
        digest = hashlib.sha256(b"2")
        for name, split in sorted(self.info.splits.items()):
            digest.update(f"{name} {split.shard_lengths}\n".encode())
        for path in sorted(self.folder.iterdir()):
            if ".array_record" in path.name:
                status = path.stat()
                digest.update(f"{path.name} {status.st_size} {int(status.st_mtime)}\n".encode())
            elif path.name == "features.json" or path.name.endswith(".labels.txt"):
                digest.update(f"{path.name}\n".encode() + path.read_bytes())
        return digest.hexdigest()
