"""Random access to the examples of array_record files, and progress."""

import contextlib
import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from tensorflow_datasets.core.utils.shard_utils import FileInstruction
from tensorflow_datasets.proto import tf_example_pb2

from simplest_vit import preemption
from simplest_vit.errors import UserError, first_line

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

Result = TypeVar("Result")
_LOG = logging.getLogger(__name__)
_CHUNK = 256  # examples per task of a core
_REPORT_EVERY = 5  # seconds between two lines of progress
PREPARE_AGAIN = "mend that, restore the folder, or move it away to prepare it again"  # of a prepared data set
_NAMES = ("image/filename", "file_name", "id")  # features that may name an example


class Record(NamedTuple):
    """An example as stored: the bytes of its image, its labels, and its name for messages."""

    image: bytes
    labels: list[int]
    name: str

    def decode(self, to_pixels: Callable[[bytes], np.ndarray]) -> np.ndarray:
        """Apply a decoder to the image; its UserError names the example."""
        try:
            return to_pixels(self.image)
        except UserError as error:
            raise UserError(f"{self.name}: {error}; repair it and prepare the data set again") from error


class DiskSplit:
    """A split on disk with random access: TFDS's instructions for each file, and the names of image and labels."""

    def __init__(self, shards: Sequence[FileInstruction], image: str, labels: list[str]) -> None:
        from array_record.python.array_record_data_source import ArrayRecordDataSource  # not on Windows; the rest works

        self.image, self.labels, self._folder = image, labels, Path(shards[0].filename).parent
        self._source = ArrayRecordDataSource(shards)  # opens a file when it is first read from

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Sequence[int]) -> list[Record]:
        """Read examples.

        Raises:
          UserError: If a file of the data set is damaged, or the system cannot read it.
        """
        _raise_limit_of_open_files()
        try:
            records = self._source.__getitems__(indices)
        except RuntimeError as error:
            raise cannot_read(self._folder, error, PREPARE_AGAIN) from error
        return [self._parse(index, record) for index, record in zip(indices, records, strict=True)]

    def decode(self, indices: Sequence[int], to_pixels: Callable[[bytes, int], np.ndarray]) -> dict[str, np.ndarray]:
        """Read image uint8 [n, H, W, C] and label int32 [n].

        Args:
          to_pixels: Function from the content of an image file and its position in `indices` to pixels.

        Raises:
          UserError: If an image is damaged, or as in `read`.
        """
        examples, images = self.read(indices), []
        for i, example in enumerate(examples):
            images.append(example.decode(lambda content, i=i: to_pixels(content, i)))  # type: ignore[misc]
        return {"image": np.stack(images), "label": np.array([example.labels[0] for example in examples], np.int32)}

    def map(self, work: Callable[[range], Result], what: str) -> Iterator[Result]:
        """Apply `work` to consecutive ranges of examples on all cores, and report the progress as `what`."""
        progress = Progress(what, len(self), _LOG.info)
        parts = [range(start, min(start + _CHUNK, len(self))) for start in range(0, len(self), _CHUNK)]
        with ThreadPoolExecutor(cpu_count()) as pool:
            for part, result in zip(parts, pool.map(work, parts), strict=True):
                progress.add(len(part), len(part))
                yield result

    def _parse(self, index: int, record: bytes) -> Record:
        feature = tf_example_pb2.Example.FromString(record).features.feature
        names = [feature[name].bytes_list.value[0].decode(errors="replace") for name in _NAMES if name in feature]
        labels = [feature[label].int64_list.value[0] for label in self.labels]
        return Record(feature[self.image].bytes_list.value[0], labels, f"example {index} {' '.join(names[:1])}".strip())


class Progress:
    """Counts finished work, whose total is in any unit, and reports amount, speed and remaining time every few seconds.

    Lines go to standard error, or to `report`.
    """

    def __init__(
        self, what: str, total: float, report: Callable[[str], None] | None = None, *, unit: str = "images"
    ) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._report = report or functools.partial(print, file=sys.stderr, flush=True)
        self._count, self._done = 0.0, 0.0
        self._start = self._reported = time.monotonic()

    def add(self, count: float, amount: float) -> None:
        """Count finished items and their share of the total. A signal can stop the program here."""
        preemption.check()
        self._count += count
        self._done += amount
        now = time.monotonic()
        if now - self._reported > _REPORT_EVERY:
            self._reported, seconds = now, now - self._start
            left = (self._total - self._done) / self._done * seconds if self._done else 0.0
            self._report(
                f"{self._what}: {self._count:,.0f} {self._unit}, {self._done / (self._total or 1):.0%}, "
                f"{self._count / seconds:,.0f} {self._unit}/s, {left:.0f} s to go"
            )


def cannot_read(path: Path, error: Exception, remedy: str = "mend that or restore it") -> UserError:
    """Return what to raise if a file, or one in a folder, cannot be read because of the system or because of damage."""
    reason = getattr(error, "strerror", None) or first_line(error)
    return UserError(f"{path}: cannot be read ({reason}); {remedy}, then run the same command again")


def cpu_count() -> int:
    """Count the cores that this process may use, by its affinity and its cgroup's quota, such as a container's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # "max 100000" means no quota
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, max(1, quota // period))
    return cores


@functools.cache
def _raise_limit_of_open_files() -> None:
    """Raise the soft limit, often 1,024, because every file of a data set stays open: ImageNet has about as many."""
    if resource is not None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = 8192 if hard == resource.RLIM_INFINITY else min(hard, 8192)
        if soft != resource.RLIM_INFINITY and soft < limit:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
