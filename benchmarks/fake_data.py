"""Fake data in place of a data set, for timing and compiling what does not depend on the pixels."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from simplest_vit.data.augment import Batch
from simplest_vit.data.dataset import DatasetInfo

# Height and width, channels and classes; image folders have those of ImageNet.
_SHAPES = {
    "digits": (8, 1, 10),
    "cifar10": (32, 3, 10),
    "cifar100": (32, 3, 100),
    "tiny_imagenet": (64, 3, 200),
    "imagenet": (224, 3, 1000),
    "image_folder": (224, 3, 1000),
}


def info_of(config: ConfigDict) -> DatasetInfo:
    """Describe a fake data set of the shape that a config asks for."""
    size, channels, num_classes = _SHAPES[config.data.name]
    size = config.data.image_size or size
    return info((size, size, channels), num_classes)


def info(image_shape: tuple[int, int, int], num_classes: int) -> DatasetInfo:
    """Describe a data set of the size of ImageNet that has no examples."""
    return DatasetInfo(
        name="fake",
        version="",
        description="",
        train_split="train",
        validation_split="validation",
        train_size=1_281_167,
        validation_size=50_000,
        class_names=tuple(map(str, range(num_classes))),
        image_shape=image_shape,
        eval_resize=image_shape[0],
        mean=(0.0,) * image_shape[2],
        std=(1.0,) * image_shape[2],
        fingerprint="",
    )


def batch(data: DatasetInfo, size: int) -> Batch:
    """Make a batch on the device: Gaussian images, and labels of one class each."""
    image_key, label_key = jax.random.split(jax.random.key(0))
    return {
        "image": jax.random.normal(image_key, (size, *data.image_shape)),
        "label": jax.nn.one_hot(jax.random.randint(label_key, (size,), 0, data.num_classes), data.num_classes),
        "weight": jnp.ones(size),
    }


def abstract_batch(data: DatasetInfo, size: int) -> Batch:
    """Return the shapes of a batch without making it."""
    return jax.eval_shape(lambda: batch(data, size))
