"""The entry point for data: from `config.data` to batches on the device.

    dataset = load(config.data)
    for batch in train_batches(dataset, config.data, batch_size=128, seed=0, start_step=0, sharding=None): ...
    for batch in eval_batches(dataset, batch_size=1000, sharding=None): ...

A batch is a dict of arrays that are already on the device(s): image float32 [B, H, W, C] (normalized), label float32
[B, num_classes] (one-hot, or mixed), weight float32 [B] (0 for padding). Training batch k depends only on (seed, k):
to resume, start at the step reached.
"""

from collections.abc import Iterator
from typing import Any

from jax.sharding import NamedSharding

from simplest_vit.data import in_memory, streaming
from simplest_vit.data.augment import Batch as Batch
from simplest_vit.data.dataset import Dataset as Dataset
from simplest_vit.data.dataset import InMemorySplit as InMemorySplit
from simplest_vit.data.dataset import load as load
from simplest_vit.data.records import DiskSplit as DiskSplit
from simplest_vit.errors import UserError


def steps_per_epoch(train_size: int, batch_size: int) -> int:
    """Count the full batches of a training split.

    Raises:
      UserError: If there are none.
    """
    if batch_size > train_size:
        raise UserError(
            f"batch_size={batch_size} is more than the {train_size} training examples; choose at most {train_size}"
        )
    return train_size // batch_size


def fit_batch_size(batch_size: int, train_size: int, parts: int = 1) -> int:
    """Return a batch size that the training split can fill.

    It does not depend on the number of devices, which may be another one when a run is resumed.

    Args:
      batch_size: The wanted size; it is returned if there are that many examples.
      train_size: Examples of the training split.
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

    Every epoch is a new permutation of the examples; the remainder that does not fill a batch is skipped in that epoch.

    Args:
      dataset: From `load`.
      data: `config.data`, which describes the augmentation.
      batch_size: Examples in a batch, over all devices.
      seed: Determines the order of the examples and their augmentation.
      start_step: Number of the first batch.
      sharding: Sharding of the batch axis over a mesh; None for one device.

    Returns:
      The batches of steps `start_step`, `start_step` + 1, ...

    Raises:
      UserError: If there are fewer examples than `batch_size`.
    """
    steps_per_epoch(dataset.train_size, batch_size)
    place = in_memory if isinstance(dataset.train, InMemorySplit) else streaming
    return place.train_batches(
        dataset, data, batch_size=batch_size, seed=seed, start_step=start_step, sharding=sharding
    )


def eval_batches(dataset: Dataset, *, batch_size: int, sharding: NamedSharding | None) -> Iterator[Batch]:
    """Iterate over the validation split, each example exactly once.

    Args:
      dataset: From `load`.
      batch_size: Examples in a batch; the last one is padded with examples of weight 0.
      sharding: Sharding of the batch axis over a mesh; None for one device.
    """
    place = in_memory if isinstance(dataset.validation, InMemorySplit) else streaming
    return place.eval_batches(dataset, batch_size=batch_size, sharding=sharding)
