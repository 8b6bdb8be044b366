"""The entry point for data: from `config.data` to batches on the device.

    dataset = load(config.data)
    for batch in train_batches(dataset, config.data, batch_size=128, seed=0, start_step=0, sharding=None): ...
    for batch in eval_batches(dataset, batch_size=1000, sharding=None): ...

A batch is a dict of arrays that are already on the device(s): image float32 [B, H, W, C] (normalized), label float32
[B, num_classes] (one-hot, or mixed), weight float32 [B] (0 for padding). Training batch k depends only on (seed, k):
to resume, start at the step reached.

A split on the device is sampled and augmented there by one jitted function. Its arrays are arguments of the function,
never constants; seed and step are traced. One compilation therefore serves the whole run, and each call is dispatched
without waiting for the previous one. A split on disk is streamed.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from simplest_vit.data import augment, streaming
from simplest_vit.data.augment import Batch as Batch
from simplest_vit.data.augment import Preprocessing, constrain
from simplest_vit.data.dataset import Dataset as Dataset
from simplest_vit.data.dataset import InMemorySplit as InMemorySplit
from simplest_vit.data.dataset import load as load
from simplest_vit.data.order import shuffled
from simplest_vit.data.records import DiskSplit as DiskSplit
from simplest_vit.errors import UserError


def steps_per_epoch(train_size: int, batch_size: int) -> int:
    """Count the full batches of a training split; a UserError if there are none."""
    if batch_size > train_size:
        raise UserError(
            f"batch_size={batch_size} is more than the {train_size} training examples; choose at most {train_size}"
        )
    return train_size // batch_size


def fit_batch_size(batch_size: int, train_size: int, parts: int = 1) -> int:
    """Return a batch size that the training split can fill.

    It does not depend on the number of devices, which may change when a run is resumed.

    Args:
      batch_size: The wanted size; it is returned if there are that many examples.
      parts: A divisor of `batch_size` that must also divide the result.

    Returns:
      Otherwise the largest `parts` * 2^k that gives at least eight steps per epoch, or `parts`.
    """
    if batch_size <= train_size:
        return batch_size
    return parts * 2 ** max(0, (train_size // (8 * parts)).bit_length() - 1)


def train_batches(
    dataset: Dataset, data: Any, *, batch_size: int, seed: int, start_step: int, sharding: NamedSharding | None
) -> Iterator[Batch]:
    """Iterate over training batches forever.

    Every epoch is a new permutation of the examples; a remainder that does not fill a batch is skipped in that epoch.

    Args:
      data: `config.data`, which describes the augmentation.
      batch_size: Examples in a batch, over all devices.
      seed: Determines the order of the examples and their augmentation.
      start_step: Number of the first batch.
      sharding: Sharding of the batch axis over the mesh for which the data set was loaded; None for one device.

    Returns:
      The batches of steps `start_step`, `start_step` + 1, ...

    Raises:
      UserError: If there are fewer examples than `batch_size`.
    """
    steps_per_epoch(dataset.train_size, batch_size)
    if isinstance(dataset.train, DiskSplit):
        return streaming.train_batches(
            dataset, data, batch_size=batch_size, seed=seed, start_step=start_step, sharding=sharding
        )
    static = {"preprocessing": Preprocessing.of(dataset, data), "batch_size": batch_size, "sharding": sharding}
    sample = functools.partial(train_batch, dataset.train.images, dataset.train.labels, np.uint32(seed), **static)
    return (sample(np.uint32(step)) for step in itertools.count(start_step))


def eval_batches(dataset: Dataset, *, batch_size: int, sharding: NamedSharding | None) -> Iterator[Batch]:
    """Iterate over the validation split, each example exactly once; arguments as in `train_batches`.

    The last batch is padded with examples of weight 0.
    """
    if isinstance(dataset.validation, DiskSplit):
        return streaming.eval_batches(dataset, batch_size=batch_size, sharding=sharding)
    static = {"preprocessing": Preprocessing.of(dataset), "batch_size": batch_size, "sharding": sharding}
    sample = functools.partial(eval_batch, dataset.validation.images, dataset.validation.labels, **static)
    return (sample(np.int32(start)) for start in range(0, dataset.validation_size, batch_size))


@functools.partial(jax.jit, static_argnames=("preprocessing", "batch_size", "sharding"))
def train_batch(
    images: jax.Array,
    labels: jax.Array,
    seed: jax.Array,
    step: jax.Array,
    *,
    preprocessing: Preprocessing,
    batch_size: int,
    sharding: NamedSharding | None,
) -> Batch:
    """Make the training batch of a step, as `augment.augment_batch` returns it.

    Images uint8 [N, H, W, C] and labels int32 [N] are the whole split; seed and step are uint32 scalars; `batch_size`
    is at most N.
    """
    size = len(labels)
    epoch, step_of_epoch = jnp.divmod(step, size // batch_size)
    position = step_of_epoch * batch_size + jnp.arange(batch_size, dtype=jnp.uint32)
    index = constrain(shuffled(position, size, seed, epoch), sharding)
    key = jax.random.fold_in(jax.random.key(seed), step)
    return constrain(augment.augment_batch(key, images[index], labels[index], preprocessing), sharding)


@functools.partial(jax.jit, static_argnames=("preprocessing", "batch_size", "sharding"))
def eval_batch(
    images: jax.Array,
    labels: jax.Array,
    start: jax.Array,
    *,
    preprocessing: Preprocessing,
    batch_size: int,
    sharding: NamedSharding | None,
) -> Batch:
    """Make a batch of the examples from `start` on; arguments as in `train_batch`, weight 0 past the last example."""
    index = constrain(start + jnp.arange(batch_size), sharding)
    weight = (index < len(labels)).astype(jnp.float32)
    return constrain(augment.normalize_batch(images[index], labels[index], weight, preprocessing), sharding)
