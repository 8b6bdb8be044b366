"""The one door to data: from a config to batches on the device.

    dataset = load(config.data)
    for batch in train_batches(dataset, config, start_step=0, sharding=sharding): ...
    for batch in eval_batches(dataset, config, sharding=sharding, batch_size=1000): ...

A batch is a dict of arrays already on the device(s): image float32 [B, H, W, C] (normalized), label float32
[B, num_classes] (one-hot, or mixed), weight float32 [B] (0 for padding). Training batch k is a function of (seed, k)
alone: to resume, start at the step reached.
"""

from collections.abc import Iterator
from typing import Any

from jax.sharding import NamedSharding

from simplest_vit.data import device, host
from simplest_vit.data.augment import Batch
from simplest_vit.data.dataset import Arrays, Dataset, DatasetInfo
from simplest_vit.data.dataset import Source as Source
from simplest_vit.data.dataset import load as load
from simplest_vit.errors import UserError


def steps_per_epoch(dataset: DatasetInfo, config: Any) -> int:
    """Count the full batches in the training split.

    Raises:
      UserError: If there is none.
    """
    if config.batch_size > dataset.train_size:
        raise UserError(
            f"batch_size={config.batch_size}: more than the {dataset.train_size} training examples of "
            f"{dataset.name}; choose at most {dataset.train_size}"
        )
    return dataset.train_size // config.batch_size


def train_batches(dataset: Dataset, config: Any, *, start_step: int, sharding: NamedSharding | None) -> Iterator[Batch]:
    """Iterate over training batches without end.

    Every epoch is a new permutation of the examples; those that do not fill a batch are left out of it.

    Args:
      dataset: From `load`.
      config: The whole config.
      start_step: The first batch.
      sharding: Over the batch axis of a mesh; None for one device.

    Returns:
      The batches of steps `start_step`, `start_step` + 1, ...

    Raises:
      UserError: If there are fewer examples than `batch_size`.
    """
    steps_per_epoch(dataset, config)
    place = device if isinstance(dataset.train, Arrays) else host
    return place.train_batches(dataset, config, start_step=start_step, sharding=sharding)


def eval_batches(dataset: Dataset, config: Any, *, sharding: NamedSharding | None, batch_size: int) -> Iterator[Batch]:
    """Iterate over the validation split, each example exactly once.

    Args:
      dataset: From `load`.
      config: The whole config.
      sharding: Over the batch axis of a mesh; None for one device.
      batch_size: Examples in a batch; the last one is padded with weight 0.
    """
    place = device if isinstance(dataset.validation, Arrays) else host
    return place.eval_batches(dataset, config, sharding=sharding, batch_size=batch_size)
