"""Augmentation on the device: pure functions from a random key and a batch to a batch.

The order is crop, flip, RandAugment (all on uint8), normalize, then mixup or CutMix.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simplest_vit.data.mix import cutmix, mixup
from simplest_vit.data.rand_augment import rand_augment

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What is done to a batch; hashable, for it is a static argument of `jax.jit`.

    Attributes:
      mean: per channel, of pixels in [0, 1].
      std: per channel, of pixels in [0, 1].
      num_classes: number of classes.
      crop_padding: zero padding around an image before a random crop of its own size; 0 for no crop.
      flip: whether half of the images are mirrored left to right.
      num_ops: RandAugment's operations for each image; 0 for none.
      magnitude: RandAugment's magnitude, 0..30.
      mixup_alpha: parameter of mixup's Beta distribution; 0 for no mixup.
      cutmix_alpha: parameter of CutMix's; 0 for no CutMix. With both, each batch draws one of them.
      mixup_mode: "batch" for one weight or box a batch, "example" for one each.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    crop_padding: int = 0
    flip: bool = False
    num_ops: int = 0
    magnitude: int = 10
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    mixup_mode: str = "batch"

    @classmethod
    def from_config(
        cls, data: Any, mean: tuple[float, ...], std: tuple[float, ...], num_classes: int
    ) -> "Preprocessing":
        """Reads the fields of `config.data` of the same names."""
        return cls(
            mean,
            std,
            num_classes,
            crop_padding=data.crop_padding,
            flip=data.flip,
            num_ops=data.rand_augment.num_ops,
            magnitude=data.rand_augment.magnitude,
            mixup_alpha=data.mixup_alpha,
            cutmix_alpha=data.cutmix_alpha,
            mixup_mode=data.mixup_mode,
        )


def train_batch(key: jax.Array, images: jax.Array, labels: jax.Array, preprocessing: Preprocessing) -> Batch:
    """Augments a batch of raw examples.

    Args:
      key: random key of the batch.
      images: uint8 [B, H, W, C].
      labels: int32 [B].
      preprocessing: what to do.

    Returns:
      image float32 [B, H, W, C], label float32 [B, num_classes], weight float32 [B] of ones.
    """
    p = preprocessing
    crop_key, rand_augment_key, mix_key = jax.random.split(key, 3)
    if p.crop_padding or p.flip:
        images = random_crop_and_flip(crop_key, images, p.crop_padding, p.flip)
    if p.num_ops:
        images = rand_augment(rand_augment_key, images, p.num_ops, p.magnitude)
    x, y = normalize(images, p.mean, p.std), jax.nn.one_hot(labels, p.num_classes)
    per_example = p.mixup_mode == "example"
    if p.mixup_alpha and p.cutmix_alpha:
        which_key, mix_key = jax.random.split(mix_key)
        # Both are computed: a condition would be decided by the host of a GPU.
        mixed = mixup(mix_key, x, y, p.mixup_alpha, per_example), cutmix(mix_key, x, y, p.cutmix_alpha, per_example)
        x, y = optax.tree.where(jax.random.bernoulli(which_key), *mixed)
    elif p.mixup_alpha:
        x, y = mixup(mix_key, x, y, p.mixup_alpha, per_example)
    elif p.cutmix_alpha:
        x, y = cutmix(mix_key, x, y, p.cutmix_alpha, per_example)
    return {"image": x, "label": y, "weight": jnp.ones(len(labels))}


def eval_batch(images: jax.Array, labels: jax.Array, weight: jax.Array, preprocessing: Preprocessing) -> Batch:
    """Normalizes a batch; `weight` float32 [B] is 0 for padding. Shapes as in `train_batch`."""
    return {
        "image": normalize(images, preprocessing.mean, preprocessing.std),
        "label": jax.nn.one_hot(labels, preprocessing.num_classes),
        "weight": weight,
    }


def random_crop_and_flip(key: jax.Array, images: jax.Array, padding: int, flip: bool) -> jax.Array:
    """Shifts each image by up to `padding` pixels along both axes, and mirrors half of them.

    The same as padding with zeros, a random crop of the original size, then the flip: one gather.

    Args:
      key: random key.
      images: uint8 [B, H, W, C].
      padding: pixels of padding on each side; 0 for no crop.
      flip: whether to mirror.

    Returns:
      Images like `images`.
    """
    batch, height, width, _ = images.shape
    offset_key, flip_key = jax.random.split(key)
    offset = jax.random.randint(offset_key, (2, batch, 1), -padding, padding + 1)
    columns = jnp.arange(width)[None]
    if flip:
        mirrored = jax.random.bernoulli(flip_key, 0.5, (batch, 1))
        columns = jnp.where(mirrored, columns[:, ::-1], columns)
    y = jnp.arange(height)[None] + offset[0]
    x = columns + offset[1]
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    shifted = images[jnp.arange(batch)[:, None, None], y[:, :, None], x[:, None, :]]
    return jnp.where(inside[..., None], shifted, jnp.zeros((), images.dtype))


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Maps uint8 images [B, H, W, C] to float32 with the mean and deviation given per channel."""
    scale = 1 / (255 * np.asarray(std, np.float32))
    offset = np.asarray(mean, np.float32) / np.asarray(std, np.float32)
    return images.astype(jnp.float32) * scale[None, None, None] - offset[None, None, None]
