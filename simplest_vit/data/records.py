"""Random access to array_record files, with progress; few are open at a time, and damage is a failed checksum only."""

import contextlib
import errno
import functools
import itertools
import logging
import os
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tensorflow_datasets.core.utils.shard_utils import FileInstruction
from tensorflow_datasets.proto import tf_example_pb2

from simplest_vit import preemption
from simplest_vit.errors import TrainingError, UserError, first_line

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

Result = TypeVar("Result")
_LOG = logging.getLogger(__name__)
_CHUNK = 256  # examples per task of a core
_REPORT_EVERY = 5  # seconds between two lines of progress
_MAX_THREADS = 16  # parallel reads of one request, for network file systems
_NAMES = ("image/filename", "file_name", "id")  # features that may name an example
_REMEDIES = {
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the whole machine has too many open files",
    errno.ENOENT: "restore it, or mount its disk",
    errno.EACCES: "make it readable",
}


class Record(NamedTuple):
    """An example as stored: the bytes of its image, its labels, and its name for messages."""

    image: bytes
    labels: list[int]
    name: str

    def decode(self, to_pixels: Callable[..., np.ndarray], *arguments: Any) -> np.ndarray:
        """Apply a decoder to the image and further arguments; its UserError names the example."""
        try:
            return to_pixels(self.image, *arguments)
        except UserError as error:
            raise UserError(f"{self.name}: {error}; repair it and prepare the data set again") from error


class DiskSplit:
    """A split on disk with random access: TFDS's instructions for each file, and the names of image and labels."""

    def __init__(self, shards: Sequence[FileInstruction], image: str, labels: list[str]) -> None:
        self.shards, self.image, self.labels = shards, image, labels
        self._ends = list(itertools.accumulate((shard.take for shard in shards), initial=0))[1:]
        self._reader = functools.lru_cache(_max_open_files() // 4)(self._open)  # dropped readers are closed

    def __reduce__(self) -> tuple:  # the readers stay in their process
        return type(self), (self.shards, self.image, self.labels)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, indices: Sequence[int]) -> list[Record]:
        """Read examples.

        Raises:
          UserError: If a file of the data set is damaged.
          TrainingError: If the system cannot read it.
        """
        places: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            places.setdefault(bisect_right(self._ends, index), []).append(place)

        def read_shard(number: int) -> list[bytes]:
            shard = self.shards[number]
            first = self._ends[number] - shard.take - shard.skip
            try:
                return self._reader(number).read([indices[place] - first for place in places[number]])
            except OSError as error:
                raise cannot_read(Path(shard.filename), error) from error
            except RuntimeError as error:
                raise _explain(error, Path(shard.filename)) from error

        with ThreadPoolExecutor(_MAX_THREADS) as pool:  # starts as many threads as there are shards
            records = list(pool.map(read_shard, places))
        found = dict(zip(itertools.chain(*places.values()), itertools.chain(*records), strict=True))
        return [self._parse(index, found[place]) for place, index in enumerate(indices)]

    def decode(self, indices: Sequence[int], to_pixels: Callable[[bytes, int], np.ndarray]) -> dict[str, np.ndarray]:
        """Read image uint8 [n, H, W, C] and label int32 [n].

        Args:
          to_pixels: Function from the content of an image file and its position in `indices` to pixels.

        Raises:
          UserError: If an image or a file of the data set is damaged.
          TrainingError: If the system cannot read it.
        """
        examples = self.read(indices)
        images = [example.decode(to_pixels, i) for i, example in enumerate(examples)]
        return {"image": np.stack(images), "label": np.array([example.labels[0] for example in examples], np.int32)}

    def map(self, work: Callable[[range], Result], what: str) -> Iterator[Result]:
        """Apply `work` to consecutive ranges of examples on all cores, and report the progress as `what`."""
        progress = Progress(what, len(self), _LOG.info)
        parts = [range(start, min(start + _CHUNK, len(self))) for start in range(0, len(self), _CHUNK)]
        with ThreadPoolExecutor(cpu_count()) as pool:
            for part, result in zip(parts, pool.map(work, parts), strict=True):
                progress.add(len(part), len(part))
                yield result

    def _open(self, number: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader  # not on Windows, where the rest works

        shard = self.shards[number]
        Path(shard.filename).open("rb").close()  # array_record reads a missing file as one without examples
        reader = ArrayRecordReader(shard.filename, options="readahead_buffer_size:0", file_reader_buffer_size=32768)
        if reader.num_records() != shard.examples_in_shard:
            raise RuntimeError(f"{reader.num_records():,} examples; dataset_info.json says {shard.examples_in_shard:,}")
        return reader

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


def system_error(error: Exception) -> OSError | None:
    """Return the system error that array_record reports only as text, such as "write() failed: No space left"."""
    text = str(error)
    number = next((number for number in errno.errorcode if os.strerror(number) in text), None)
    return OSError(number, os.strerror(number)) if number is not None else None


def cannot_read(path: Path, error: OSError) -> TrainingError:
    """Return what to raise if the system cannot read a file of a data set, which may be sound."""
    remedy = _REMEDIES.get(error.errno or 0, "mend that")
    return TrainingError(f"{path}: cannot be read ({error.strerror}); {remedy}, then run the same command again")


def _explain(error: RuntimeError, path: Path) -> UserError | TrainingError:
    """Return what to raise if array_record cannot read a file."""
    if problem := system_error(error):
        return cannot_read(path, problem)
    from simplest_vit.data.builders import find_builder  # which imports this module

    is_ours = find_builder(path.name.partition("-")[0])  # other sets cannot be prepared again by this program
    remedy = f", or remove {path.parent} to prepare it again" if is_ours else " from a copy or with TFDS"
    return UserError(f"{path}: damaged ({first_line(error)}); restore it{remedy}")


def cpu_count() -> int:
    """Count the cores that this process may use, by its affinity and its cgroup's quota, such as a container's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # "max 100000" means no quota
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, max(1, quota // period))
    return cores


@functools.cache
def _max_open_files() -> int:
    """Return the number of files that may be open, at most 8,192, after raising the soft limit so far if necessary."""
    if resource is None:
        return 512
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 8192 if hard == resource.RLIM_INFINITY else min(hard, 8192)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit
