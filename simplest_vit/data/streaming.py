"""Make batches of a data set that stays on disk: Grain reads, decodes and crops; the device does the rest.

The unit of work is a chunk of a few dozen examples. Chunk k of the run depends only on (seed, k), so neither the number
of workers nor the number of hosts changes a batch. Each host reads only its own chunks; a resume starts at the chunk
reached.
"""

import atexit
import collections
import functools
import gc
import itertools
import logging
import math
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding

from simplest_vit import preemption
from simplest_vit.data import augment
from simplest_vit.data.augment import Batch, Preprocessing, constrain
from simplest_vit.data.dataset import Dataset
from simplest_vit.data.decode import decode_image, eval_image, image_size, resize_box
from simplest_vit.data.order import shuffled
from simplest_vit.data.records import cpu_count
from simplest_vit.errors import TrainingError, UserError

_LOG = logging.getLogger(__name__)
_MAX_CHUNK = 32
_IMAGES_PER_WORKER = 2000  # a worker with fewer takes longer to start than to work
_BATCHES_AHEAD = 2  # on the device as uint8, beyond the one in use
# Signals that end a worker process, with cause and remedy.
_SIGNALS = {
    "SIGKILL": "SIGKILL, as sent when memory runs out; lower config.data.num_workers or free memory",
    "SIGBUS": "SIGBUS: /dev/shm is full; enlarge it (docker run --shm-size=1g) or set config.data.num_workers=0",
}
_Chunk = dict[str, np.ndarray]


def train_chunks(dataset: Dataset, data: Any, *, batch_size: int, seed: int) -> grain.MapDataset:
    """Make chunk k of this host: image uint8 [chunk, H, W, C] and label int32 [chunk]."""
    split: Any = dataset.train
    size, chunks, info, random = dataset.train_size, _rows(batch_size), dataset.info, data.random_resized_crop

    def read(k: int) -> _Chunk:  # is sent to the worker processes
        step, part = divmod(k, len(chunks))
        epoch, step_of_epoch = divmod(step, size // batch_size)
        index = shuffled(step_of_epoch * batch_size + chunks[part], size, seed, epoch)

        def to_pixels(content: bytes, i: int) -> np.ndarray:
            if not random:
                return eval_image(content, info.image_shape, info.eval_resize)
            rng = np.random.default_rng((seed, step, int(chunks[part, i])))
            return random_resized_crop(content, rng, info.image_shape[0], info.image_shape[2])

        return split.decode(index.tolist(), to_pixels)

    return grain.MapDataset.range(2**62).map(read)


def eval_chunks(dataset: Dataset, batch_size: int) -> grain.MapDataset:
    """Make chunk k: image and label as in training, and weight float32 [chunk], 0 past the last example."""
    split: Any = dataset.validation
    size, chunks, info = dataset.validation_size, _rows(batch_size), dataset.info

    def read(k: int) -> _Chunk:
        step, part = divmod(k, len(chunks))
        index = step * batch_size + chunks[part]
        present = np.minimum(index, size - 1).tolist()
        chunk = split.decode(present, lambda content, _: eval_image(content, info.image_shape, info.eval_resize))
        return {**chunk, "weight": (index < size).astype(np.float32)}

    return grain.MapDataset.range(-(-size // batch_size) * len(chunks)).map(read)


def _rows(batch_size: int) -> np.ndarray:
    """Compute the rows of a batch that this host reads, by chunk: int64 [chunks, chunk]."""
    hosts = jax.process_count()
    if batch_size % hosts:
        raise UserError(f"batch_size={batch_size}: not divisible by the {hosts} hosts")
    rows = np.arange(batch_size).reshape(hosts, -1)[jax.process_index()]
    return rows.reshape(-1, max(d for d in range(1, _MAX_CHUNK + 1) if rows.size % d == 0))


def random_resized_crop(content: bytes, rng: np.random.Generator, size: int, channels: int) -> np.ndarray:
    """Decode a random box of an image and resize it (bilinear, antialiased) to uint8 [size, size, channels].

    The box is drawn as torchvision's RandomResizedCrop does: 8 to 100 % of the area, aspect ratio 3/4 to 4/3 (uniform
    in its logarithm), ten tries, then the central box of the nearest allowed ratio.
    """
    height, width = image_size(content)
    left, top, box_width, box_height = map(float, _random_box(rng, height, width))
    # Decode the whole image, but only as large as needed for the box to have `size` pixels per side.
    enough = min(1.0, size / min(box_width, box_height))
    pixels = decode_image(content, channels, (math.ceil(height * enough), math.ceil(width * enough)))
    y, x = pixels.shape[0] / height, pixels.shape[1] / width
    left, right, top, bottom = left * x, (left + box_width) * x, top * y, (top + box_height) * y
    # Crop first, because the filter must not see pixels outside the box.
    x0, y0 = math.floor(left), math.floor(top)
    inside = pixels[y0 : math.ceil(bottom), x0 : math.ceil(right)]
    return resize_box(inside, (left - x0, top - y0, right - x0, bottom - y0), size)


def _random_box(rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    """Draw a random box (left, top, width, height)."""
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
    dataset: Dataset, data: Any, *, batch_size: int, seed: int, start_step: int, sharding: NamedSharding | None
) -> Iterator[Batch]:
    """Iterate as `input_pipeline.train_batches` does, two batches ahead on the device."""
    chunks_per_batch = len(_rows(batch_size))
    chunks = train_chunks(dataset, data, batch_size=batch_size, seed=seed)[start_step * chunks_per_batch :]
    workers = _workers(dataset.num_workers, dataset.train_size)
    where = f"{workers} processes" if workers else "threads"
    _LOG.info("images are decoded in %s (data.num_workers); cores: %d", where, cpu_count())
    batches = _read_batches(chunks, chunks_per_batch, workers)
    transferred = _ahead(_to_device(batch, sharding) for batch in batches)
    train = functools.partial(_augment, preprocessing=Preprocessing.of(dataset, data), sharding=sharding)
    steps = itertools.count(start_step)
    return (train(batch, np.uint32(seed), np.uint32(next(steps))) for batch in transferred)


def eval_batches(dataset: Dataset, *, batch_size: int, sharding: NamedSharding | None) -> Iterator[Batch]:
    """Iterate as `input_pipeline.eval_batches` does, two batches ahead on the device."""
    workers = _workers(dataset.num_workers, dataset.validation_size)
    batches = _read_batches(eval_chunks(dataset, batch_size), len(_rows(batch_size)), workers)
    transferred = _ahead(_to_device(batch, sharding) for batch in batches)
    preprocessing = Preprocessing.of(dataset)
    return (_normalize(batch, preprocessing=preprocessing, sharding=sharding) for batch in transferred)


def _workers(num_workers: int | None, images: int) -> int:
    """Choose the number of decoding processes: one per core, but none that would take longer to start than to work."""
    if num_workers is not None:
        return num_workers
    return min(cpu_count(), images // jax.process_count() // _IMAGES_PER_WORKER)


def _read_batches(chunks: grain.MapDataset, chunks_per_batch: int, num_workers: int) -> Iterator[_Chunk]:
    """Read chunks in worker processes, or in threads of this process, and join them into batches."""
    if num_workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read flags even if the program defines none
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        stream = chunks.to_iter_dataset(options).mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2),
            worker_init_fn=_end_with_parent,
        )
    else:
        threads = cpu_count()
        stream = chunks.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
    iterator = iter(stream)
    stop = atexit.register(functools.partial(_close, iterator, num_workers))  # before multiprocessing's own
    try:
        if num_workers:
            _start_workers(iterator)
        while batch := _join(itertools.islice(iterator, chunks_per_batch)):
            yield batch
    except RuntimeError as error:  # Grain's
        number = re.search(r"exit code -(\d+)", str(error))
        reasons = {getattr(signal, name, None): text for name, text in _SIGNALS.items()}
        reason = reasons.get(int(number[1])) if number else None
        if reason is None:
            raise
        raise TrainingError(f"a process that decodes images was ended by {reason}") from error
    finally:
        atexit.unregister(stop)
        stop()


def _start_workers(iterator: grain.DatasetIterator) -> None:
    """Start the worker processes with signals blocked; a run that receives one saves and then ends them itself.

    A terminal sends SIGINT to all processes of a command, and a cluster may send SIGTERM to all. A new process inherits
    the blocked signals of the thread that starts it, so they are blocked even while the process imports its modules.
    """
    iterator.get_state()  # creates the queues between processes, which makes multiprocessing unblock SIGINT and SIGTERM
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, preemption.SIGNALS)
    try:
        iterator.start_prefetch()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _close(iterator: grain.DatasetIterator, num_workers: int) -> None:
    """End the workers and free their shared memory."""
    iterator.close()
    if num_workers:
        gc.collect()  # Grain ends iteration with an exception, in a reference cycle with frames that hold shared memory


def _end_with_parent(worker: int, workers: int) -> None:
    """End this worker process with its parent; otherwise it would outlive a killed run and keep its shared memory."""
    parent: Any = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _join(chunks: Iterator[_Chunk]) -> _Chunk:
    """Join chunks into one, copied out of shared memory; return an empty dict if there are none."""
    parts = list(chunks)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}


def _to_device(batch: _Chunk, sharding: NamedSharding | None) -> Batch:
    """Start the transfer of this host's part of a batch."""
    if sharding is None:
        return jax.device_put(batch)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the same batches, with the transfer of the next two already started."""
    queue = collections.deque(itertools.islice(batches, 1 + _BATCHES_AHEAD))
    while queue:
        yield queue.popleft()
        queue.extend(itertools.islice(batches, 1))


@functools.partial(jax.jit, static_argnames=("preprocessing", "sharding"))
def _augment(
    batch: Batch, seed: jax.Array, step: jax.Array, *, preprocessing: Preprocessing, sharding: NamedSharding | None
) -> Batch:
    key = jax.random.fold_in(jax.random.key(seed), step)
    return constrain(augment.augment_batch(key, batch["image"], batch["label"], preprocessing), sharding)


@functools.partial(jax.jit, static_argnames=("preprocessing", "sharding"))
def _normalize(batch: Batch, *, preprocessing: Preprocessing, sharding: NamedSharding | None) -> Batch:
    return constrain(augment.normalize_batch(batch["image"], batch["label"], batch["weight"], preprocessing), sharding)
