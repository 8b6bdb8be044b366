"""Noise in the place of a data set: what is timed or compiled here does not depend on the pixels."""

import jax
import jax.numpy as jnp
import numpy as np

from simplest_vit.data.dataset import DatasetInfo
from simplest_vit.data.pipeline import Batch


def info(image_shape: tuple[int, int, int], num_classes: int) -> DatasetInfo:
    """A data set of the size of ImageNet, of which there are no examples."""
    return DatasetInfo(
        name="noise",
        version="",
        train_size=1_281_167,
        validation_size=50_000,
        class_names=tuple(map(str, range(num_classes))),
        image_shape=image_shape,
        mean=(0.0,) * image_shape[2],
        std=(1.0,) * image_shape[2],
        fingerprint="",
    )


def batch(data: DatasetInfo, size: int) -> Batch:
    """A batch on the device: Gaussian images and labels of one class each."""
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.normal(size=(size, *data.image_shape)), jnp.float32),
        "label": jax.nn.one_hot(jnp.asarray(rng.integers(data.num_classes, size=size)), data.num_classes),
        "weight": jnp.ones(size),
    }


def abstract_batch(data: DatasetInfo, size: int) -> Batch:
    """The shapes of a batch."""
    return jax.eval_shape(lambda: batch(data, size))
