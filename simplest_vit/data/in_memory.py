"""Make batches of a data set that lives on the device: sampling and augmentation in one jitted function.

The arrays are arguments of the jitted functions, never constants in them, and (seed, step) are traced. One trace and
one compilation therefore serve the whole run, and each call is dispatched without waiting for the previous one.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from simplest_vit.data import augment
from simplest_vit.data.augment import Batch, Preprocessing
from simplest_vit.data.dataset import Dataset, InMemorySplit
from simplest_vit.data.order import shuffled


def train_batches(
    dataset: Dataset, data: Any, *, batch_size: int, seed: int, start_step: int, sharding: NamedSharding | None
) -> Iterator[Batch]:
    """Iterate as `input_pipeline.train_batches` does; the split is on the device."""
    arrays = _replicate(dataset.train, sharding)
    static = {"preprocessing": Preprocessing.of(dataset, data), "batch_size": batch_size, "sharding": sharding}
    sample = functools.partial(train_batch, arrays.images, arrays.labels, np.uint32(seed), **static)
    return (sample(np.uint32(step)) for step in itertools.count(start_step))


def eval_batches(dataset: Dataset, *, batch_size: int, sharding: NamedSharding | None) -> Iterator[Batch]:
    """Iterate as `input_pipeline.eval_batches` does; the split is on the device."""
    arrays = _replicate(dataset.validation, sharding)
    static = {"preprocessing": Preprocessing.of(dataset), "batch_size": batch_size, "sharding": sharding}
    sample = functools.partial(eval_batch, arrays.images, arrays.labels, **static)
    return (sample(np.int32(start)) for start in range(0, dataset.validation_size, batch_size))


def _replicate(arrays: Any, sharding: NamedSharding | None) -> InMemorySplit:
    """Put a whole split on every device of a mesh, so that each samples its part of a batch without communication.

    Each process has loaded the split and copies it to its own devices. The result is cached for later evaluations.
    """
    if sharding is None:
        return arrays
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())

    def replicate(array: jax.Array) -> jax.Array:
        copies = [jax.device_put(array, device) for device in everywhere.addressable_devices]
        return jax.make_array_from_single_device_arrays(array.shape, everywhere, copies)

    if sharding.mesh not in arrays.copies:
        arrays.copies[sharding.mesh] = InMemorySplit(replicate(arrays.images), replicate(arrays.labels))
    return arrays.copies[sharding.mesh]


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
    """Make the training batch of a step, as `augment.train_batch` returns it.

    Images uint8 [N, H, W, C] and labels int32 [N] are the whole split; seed and step are uint32 scalars; `batch_size`
    is at most N.
    """
    size = len(labels)
    epoch, step_of_epoch = jnp.divmod(step, size // batch_size)
    position = step_of_epoch * batch_size + jnp.arange(batch_size, dtype=jnp.uint32)
    index = constrain(shuffled(position, size, seed, epoch), sharding)
    key = jax.random.fold_in(jax.random.key(seed), step)
    return constrain(augment.train_batch(key, images[index], labels[index], preprocessing), sharding)


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
    return constrain(augment.eval_batch(images[index], labels[index], weight, preprocessing), sharding)


def constrain(tree: Any, sharding: NamedSharding | None) -> Any:
    """Shard every array of a tree along its first axis according to `sharding`."""
    return tree if sharding is None else jax.lax.with_sharding_constraint(tree, sharding)
