"""The one door to data: from a config to batches on the device.

    dataset = load(config.data)
    for batch in train_batches(dataset, config, start_step=0, sharding=sharding): ...
    for batch in eval_batches(dataset, config, sharding=sharding, batch_size=1000): ...

A batch is a dict of arrays already on the device(s): image float32 [B, H, W, C] (normalized), label
float32 [B, num_classes] (one-hot, or mixed), weight float32 [B] (0 for padding). Training batch k is a
function of (seed, k) alone: to resume, start at the step reached.
"""

from collections.abc import Iterator
from typing import Any

from jax.sharding import NamedSharding

from simplest_vit.data import device, host
from simplest_vit.data.augment import Batch, Preprocessing
from simplest_vit.data.dataset import Arrays, Dataset, DatasetInfo, Source, load
from simplest_vit.errors import UserError

__all__ = [
    "Arrays",
    "Batch",
    "Dataset",
    "DatasetInfo",
    "Source",
    "eval_batches",
    "load",
    "steps_per_epoch",
    "train_batches",
]


def steps_per_epoch(dataset: DatasetInfo, config: Any) -> int:
    """Returns the number of full batches in the training split.

    Raises:
      UserError: there is none.
    """
    if config.batch_size > dataset.train_size:
        raise UserError(
            f"batch_size={config.batch_size}: more than the {dataset.train_size} training examples of "
            f"{dataset.name}; choose at most {dataset.train_size}"
        )
    return dataset.train_size // config.batch_size


def train_batches(dataset: Dataset, config: Any, *, start_step: int, sharding: NamedSharding | None) -> Iterator[Batch]:
    """Returns an endless iterator over training batches.

    Every epoch is a new permutation of the examples; those that do not fill a batch wait for the next.

    Args:
      dataset: from `load`.
      config: the whole config; `seed`, `batch_size` and the augmentation in `data` are read.
      start_step: the first batch.
      sharding: over the batch axis of a mesh; None for one device.

    Returns:
      The batches of steps `start_step`, `start_step` + 1, ...

    Raises:
      UserError: there are fewer examples than `batch_size`.
    """
    steps_per_epoch(dataset, config)
    data = config.data
    preprocessing = Preprocessing.from_config(data, dataset.mean, dataset.std, dataset.num_classes)
    if isinstance(dataset.train, Arrays):
        return device.train_batches(
            dataset.train,
            preprocessing,
            seed=config.seed,
            batch_size=config.batch_size,
            start_step=start_step,
            sharding=sharding,
        )
    return host.train_batches(
        dataset.train,
        preprocessing,
        image_shape=dataset.image_shape,
        random_resized_crop=data.random_resized_crop,
        seed=config.seed,
        batch_size=config.batch_size,
        start_step=start_step,
        num_workers=data.num_workers,
        sharding=sharding,
    )


def eval_batches(dataset: Dataset, config: Any, *, sharding: NamedSharding | None, batch_size: int) -> Iterator[Batch]:
    """Returns an iterator over the validation split, each example exactly once.

    Args:
      dataset: from `load`.
      config: the whole config.
      sharding: over the batch axis of a mesh; None for one device.
      batch_size: examples in a batch; the last one is padded with weight 0.

    Returns:
      The batches, in the order of the split.
    """
    preprocessing = Preprocessing(dataset.mean, dataset.std, dataset.num_classes)
    if isinstance(dataset.validation, Arrays):
        return device.eval_batches(dataset.validation, preprocessing, batch_size=batch_size, sharding=sharding)
    return host.eval_batches(
        dataset.validation,
        preprocessing,
        image_shape=dataset.image_shape,
        random_resized_crop=config.data.random_resized_crop,
        batch_size=batch_size,
        num_workers=config.data.num_workers,
        sharding=sharding,
    )
