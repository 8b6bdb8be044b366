"""Batches of a data set that stays on disk: Grain reads, decodes and crops; the device does the rest.

Work comes in chunks of a few dozen examples. Chunk k of the run holds fixed positions of fixed batches and depends
on (seed, k) alone, so neither the number of workers nor, for a given global batch, the number of hosts changes which
examples form a batch. Each host reads only its own chunks, and a resume starts at the chunk reached.
"""

import atexit
import collections
import dataclasses
import functools
import gc
import itertools
import math
import multiprocessing
import os
import threading
from collections.abc import Iterator

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding

from simplest_vit.data import augment
from simplest_vit.data.augment import Batch, Preprocessing
from simplest_vit.data.dataset import Source
from simplest_vit.data.decode import decode_image, eval_image, image_size, resize_box
from simplest_vit.data.device import constrain
from simplest_vit.data.order import shuffled
from simplest_vit.errors import UserError

_MAX_CHUNK = 32
_BATCHES_AHEAD = 2  # on the device as uint8, beyond the one in use
_Chunk = dict[str, np.ndarray]
_Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Makes chunks of examples; it is sent to the worker processes.

    Attributes:
      source: the split.
      image_shape: (H, W, C) of the result.
      random_resized_crop: whether training images are random boxes; otherwise they are those of evaluation.
      seed: seed of the run.
      batch_size: global batch size.
      first_row: of the global batch, where this host's part begins.
      rows: of the global batch, this host's.
      chunk: examples in a chunk; divides `rows`.
    """

    source: Source
    image_shape: tuple[int, int, int]
    random_resized_crop: bool
    seed: int
    batch_size: int
    first_row: int
    rows: int
    chunk: int

    def positions(self, k: int) -> tuple[int, np.ndarray]:
        """Returns the batch of chunk k and the positions in it, int64 [chunk]."""
        step, part = divmod(k, self.rows // self.chunk)
        return step, self.first_row + part * self.chunk + np.arange(self.chunk)

    def train_chunk(self, k: int) -> _Chunk:
        """Returns image uint8 [chunk, H, W, C] and label int32 [chunk]."""
        step, row = self.positions(k)
        size = len(self.source)
        epoch, step_of_epoch = divmod(step, size // self.batch_size)
        index = shuffled(step_of_epoch * self.batch_size + row, size, self.seed, epoch)
        if not self.random_resized_crop:
            return self._read(index.tolist(), None)
        return self._read(index.tolist(), [np.random.default_rng((self.seed, step, r)) for r in row.tolist()])

    def eval_chunk(self, k: int) -> _Chunk:
        """Returns image and label as `train_chunk`, and weight float32 [chunk], 0 past the last example."""
        step, row = self.positions(k)
        index = step * self.batch_size + row
        weight = (index < len(self.source)).astype(np.float32)
        chunk = self._read(np.minimum(index, len(self.source) - 1).tolist(), None)
        return {**chunk, "weight": weight}

    def _read(self, indices: list[int], rngs: list[np.random.Generator] | None) -> _Chunk:
        images = np.empty((self.chunk, *self.image_shape), np.uint8)
        labels = np.empty(self.chunk, np.int32)
        for i, (content, label, name) in enumerate(self.source.read(indices)):
            try:
                if rngs:
                    images[i] = random_resized_crop(content, rngs[i], self.image_shape[0], self.image_shape[2])
                else:
                    images[i] = eval_image(content, self.image_shape, self.random_resized_crop)
            except UserError as error:
                raise UserError(f"{name}: {error}; repair it and prepare the data set anew") from error
            labels[i] = label
        return {"image": images, "label": labels}


def random_resized_crop(content: bytes, rng: np.random.Generator, size: int, channels: int) -> np.ndarray:
    """Decodes a random box of an image and resizes it (bilinear, antialiased).

    The box is drawn as torchvision's RandomResizedCrop does: 8 to 100 % of the area, aspect ratio 3/4 to 4/3 (uniform
    in its logarithm), ten tries, then the central box of the nearest allowed ratio.

    Args:
      content: an image file.
      rng: where the box comes from.
      size: side of the result.
      channels: 1 or 3.

    Returns:
      Pixels, uint8 [size, size, channels].
    """
    height, width = image_size(content)
    left, top, box_width, box_height = map(float, _random_box(rng, height, width))
    # The whole image is decoded, but no larger than it takes for the box to have `size` pixels a side.
    enough = min(1.0, size / min(box_width, box_height))
    pixels = decode_image(content, channels, (math.ceil(height * enough), math.ceil(width * enough)))
    y, x = pixels.shape[0] / height, pixels.shape[1] / width
    left, right, top, bottom = left * x, (left + box_width) * x, top * y, (top + box_height) * y
    # As after a crop: the filter must not see what lies outside.
    x0, y0 = math.floor(left), math.floor(top)
    inside = pixels[y0 : math.ceil(bottom), x0 : math.ceil(right)]
    return resize_box(inside, (left - x0, top - y0, right - x0, bottom - y0), size)


def _random_box(rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    """Returns (left, top, width, height) of a random box."""
    log_ratio = math.log(4 / 3)
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(-log_ratio, log_ratio))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def train_batches(
    source: Source,
    preprocessing: Preprocessing,
    *,
    image_shape: tuple[int, int, int],
    random_resized_crop: bool,
    seed: int,
    batch_size: int,
    start_step: int,
    num_workers: int,
    sharding: NamedSharding | None,
) -> Iterator[Batch]:
    """Yields the batches of steps `start_step`, `start_step` + 1, ... without end, two ahead on the device."""
    reader = _reader(source, image_shape, random_resized_crop, seed, batch_size)
    chunks_per_batch = reader.rows // reader.chunk
    numbers = grain.MapDataset.range(start_step * chunks_per_batch, 2**62)
    batches = _read_batches(numbers.map(reader.train_chunk), chunks_per_batch, num_workers)

    transferred = _ahead(_to_device((batch["image"], batch["label"]), sharding) for batch in batches)
    return (
        _augment(*arrays, np.uint32(seed), np.uint32(step), preprocessing=preprocessing, sharding=sharding)
        for step, arrays in zip(itertools.count(start_step), transferred, strict=False)
    )


def eval_batches(
    source: Source,
    preprocessing: Preprocessing,
    *,
    image_shape: tuple[int, int, int],
    random_resized_crop: bool,
    batch_size: int,
    num_workers: int,
    sharding: NamedSharding | None,
) -> Iterator[Batch]:
    """Yields a split in order, the last batch padded with weight 0, two ahead on the device."""
    reader = _reader(source, image_shape, random_resized_crop, 0, batch_size)
    chunks_per_batch = reader.rows // reader.chunk
    steps = -(-len(source) // batch_size)
    numbers = grain.MapDataset.range(steps * chunks_per_batch)
    batches = _read_batches(numbers.map(reader.eval_chunk), chunks_per_batch, num_workers)
    transferred = _ahead(_to_device((b["image"], b["label"], b["weight"]), sharding) for b in batches)
    return (_normalize(*arrays, preprocessing=preprocessing, sharding=sharding) for arrays in transferred)


def _reader(
    source: Source,
    image_shape: tuple[int, int, int],
    random_resized_crop: bool,
    seed: int,
    batch_size: int,
) -> _Reader:
    hosts = jax.process_count()
    if batch_size % hosts:
        raise UserError(f"batch_size={batch_size}: not divisible by the {hosts} hosts")
    rows = batch_size // hosts
    return _Reader(
        source=source,
        image_shape=image_shape,
        random_resized_crop=random_resized_crop,
        seed=seed,
        batch_size=batch_size,
        first_row=jax.process_index() * rows,
        rows=rows,
        chunk=max(d for d in range(1, _MAX_CHUNK + 1) if rows % d == 0),
    )


def _read_batches(chunks: grain.MapDataset, chunks_per_batch: int, num_workers: int) -> Iterator[_Chunk]:
    """Reads chunks in worker processes, or in threads of this one, and joins them to batches."""
    if num_workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read flags, also where the program has none
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        stream = chunks.to_iter_dataset(options).mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2),
            worker_init_fn=_end_with_parent,
        )
    else:
        threads = os.cpu_count() or 1
        stream = chunks.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
    iterator = iter(stream)
    stop = atexit.register(functools.partial(_close, iterator))  # before multiprocessing's own end
    try:
        while batch := _join(itertools.islice(iterator, chunks_per_batch)):
            yield batch
    finally:
        atexit.unregister(stop)
        stop()


def _close(iterator: grain.DatasetIterator) -> None:
    """Ends the workers and frees their shared memory."""
    iterator.close()
    gc.collect()  # Grain's end of iteration is an exception, in a cycle with the frames that hold the last chunks


def _end_with_parent(worker: int, workers: int) -> None:
    """Called in a worker process, which would outlive a run that is killed and keep its shared memory."""
    del worker, workers

    def wait() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _join(chunks: Iterator[_Chunk]) -> _Chunk:
    """Returns chunks as one, with none of the shared memory they came in; nothing if there are none."""
    parts = list(chunks)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}


def _to_device(arrays: tuple[np.ndarray, ...], sharding: NamedSharding | None) -> _Arrays:
    """Starts the transfer of this host's part of a batch."""
    if sharding is None:
        return jax.device_put(arrays)
    return tuple(jax.make_array_from_process_local_data(sharding, array) for array in arrays)


def _ahead(batches: Iterator[_Arrays]) -> Iterator[_Arrays]:
    """Yields the same batches, with the transfer of the next two begun before each is used."""
    queue = collections.deque(itertools.islice(batches, 1 + _BATCHES_AHEAD))
    while queue:
        yield queue.popleft()
        queue.extend(itertools.islice(batches, 1))


@functools.partial(jax.jit, static_argnames=("preprocessing", "sharding"))
def _augment(
    images: jax.Array,
    labels: jax.Array,
    seed: jax.Array,
    step: jax.Array,
    *,
    preprocessing: Preprocessing,
    sharding: NamedSharding | None,
) -> Batch:
    key = jax.random.fold_in(jax.random.key(seed), step)
    return constrain(augment.train_batch(key, images, labels, preprocessing), sharding)


@functools.partial(jax.jit, static_argnames=("preprocessing", "sharding"))
def _normalize(
    images: jax.Array,
    labels: jax.Array,
    weight: jax.Array,
    *,
    preprocessing: Preprocessing,
    sharding: NamedSharding | None,
) -> Batch:
    return constrain(augment.eval_batch(images, labels, weight, preprocessing), sharding)
