"""The door to data under the name that this project's users know; it is `simplest_vit.data.pipeline`."""

from simplest_vit.data.pipeline import (
    Arrays,
    Batch,
    Dataset,
    DatasetInfo,
    Source,
    eval_batches,
    load,
    steps_per_epoch,
    train_batches,
)

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
