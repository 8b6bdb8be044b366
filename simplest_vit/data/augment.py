"""Augmentation on the device: pure functions from a random key and a batch to a batch.

The order is crop, flip, RandAugment (all on uint8), normalize, then mixup or CutMix: examples are blended in
pairs, images and labels alike. An example's partner is at the mirrored position in the batch, which is in random order
anyway. (XLA fuses reversing, unlike rolling, with the preceding operations: four times as fast on a CPU.)
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from scipy import special

from simplest_vit.data.rand_augment import rand_augment

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of a batch; hashable, because it is a static argument of `jax.jit`.

    Mean and deviation are per channel, of pixels in [0, 1]; `num_ops` and `magnitude` are RandAugment's. The other
    fields are described in `config.data`.
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
    def of(cls, info: Any, data: Any = None) -> "Preprocessing":
        """Return the preprocessing of a data set: for training if `config.data` is given, else for evaluation."""
        fields = {"mean": info.mean, "std": info.std, "num_classes": info.num_classes}
        if data:
            names = ("crop_padding", "flip", "mixup_alpha", "cutmix_alpha", "mixup_mode")
            fields |= {**data.rand_augment, **{name: data[name] for name in names}}
        return cls(**fields)


def augment_batch(key: jax.Array, images: jax.Array, labels: jax.Array, preprocessing: Preprocessing) -> Batch:
    """Augment a batch of raw examples: images uint8 [B, H, W, C], labels int32 [B].

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
        # Both are computed, because a condition would make a GPU wait for its host.
        mixed = mixup(mix_key, x, y, p.mixup_alpha, per_example), cutmix(mix_key, x, y, p.cutmix_alpha, per_example)
        x, y = optax.tree.where(jax.random.bernoulli(which_key), *mixed)
    elif p.mixup_alpha:
        x, y = mixup(mix_key, x, y, p.mixup_alpha, per_example)
    elif p.cutmix_alpha:
        x, y = cutmix(mix_key, x, y, p.cutmix_alpha, per_example)
    return {"image": x, "label": y, "weight": jnp.ones(len(labels))}


def normalize_batch(images: jax.Array, labels: jax.Array, weight: jax.Array, preprocessing: Preprocessing) -> Batch:
    """Normalize a batch; `weight` float32 [B] is 0 for padding. Shapes as in `augment_batch`."""
    return {
        "image": normalize(images, preprocessing.mean, preprocessing.std),
        "label": jax.nn.one_hot(labels, preprocessing.num_classes),
        "weight": weight,
    }


def constrain(tree: Any, sharding: NamedSharding | None) -> Any:
    """Shard every array of a tree along its first axis according to `sharding`."""
    return tree if sharding is None else jax.lax.with_sharding_constraint(tree, sharding)


def random_crop_and_flip(key: jax.Array, images: jax.Array, padding: int, flip: bool) -> jax.Array:
    """Shift images, uint8 [B, H, W, C], by up to `padding` pixels along both axes; if `flip`, mirror half of them.

    Equivalent to padding with zeros, a random crop of the original size, and the flip, but in one gather.
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
    """Map uint8 images [B, H, W, C] to float32 with the mean and deviation given per channel."""
    scale = 1 / (255 * np.asarray(std, np.float32))
    offset = np.asarray(mean, np.float32) / np.asarray(std, np.float32)
    return images.astype(jnp.float32) * scale[None, None, None] - offset[None, None, None]


def mixup(
    key: jax.Array, images: jax.Array, labels: jax.Array, alpha: float, per_example: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Blend each example with its partner, whose weight is min(z, 1 - z) with z ~ Beta(alpha, alpha).

    Images are float32 [B, H, W, C], labels float32 [B, num_classes]. Each example has a weight of its own if
    `per_example`, else the batch has one.

    References:
      Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018.
    """
    z = symmetric_beta(key, alpha, (len(images) if per_example else 1,))
    weight = jnp.minimum(z, 1 - z)
    return _blend(images, weight[:, None, None, None]), _blend(labels, weight[:, None])


def cutmix(
    key: jax.Array, images: jax.Array, labels: jax.Array, alpha: float, per_example: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Paste a random box of its partner into each image; the labels are blended by area.

    The box has the image's aspect ratio, the share 1 - z of its area with z ~ Beta(alpha, alpha), and a uniformly
    random centre; the part outside the image is cut off and not counted. Arguments and result are those of `mixup`.

    References:
      Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019.
    """
    boxes = len(images) if per_example else 1
    area_key, y_key, x_key = jax.random.split(key, 3)
    side = jnp.sqrt(1 - symmetric_beta(area_key, alpha, (boxes, 1)))

    def inside(key: jax.Array, size: int) -> jax.Array:  # bool [boxes, size]
        half = jnp.floor(side * size / 2)
        centre = jax.random.randint(key, (boxes, 1), 0, size)
        position = jnp.arange(size)[None]
        return (position >= centre - half) & (position < centre + half)

    rows, columns = inside(y_key, images.shape[1]), inside(x_key, images.shape[2])
    box = rows[:, :, None, None] & columns[:, None, :, None]
    weight = rows.mean(1) * columns.mean(1)
    return jnp.where(box, images[::-1], images), _blend(labels, weight[:, None])


def symmetric_beta(key: jax.Array, alpha: float, shape: tuple[int, ...]) -> jax.Array:
    """Draw float32 from Beta(alpha, alpha) by its tabulated quantiles.

    `jax.random.beta` rejects samples in a loop of unknown length, which makes a GPU wait for its host in every step.
    The distribution function is exact at 8,192 quantiles, and within 1 / 8,192 elsewhere.
    """
    quantiles = jnp.asarray(_quantiles(alpha))
    position = jax.random.uniform(key, shape) * (len(quantiles) - 1)
    cell = jnp.minimum(position.astype(jnp.int32), len(quantiles) - 2)
    low, high = quantiles[cell], quantiles[cell + 1]
    return low + (position - cell) * (high - low)


@functools.cache
def _quantiles(alpha: float) -> np.ndarray:
    """Compute the quantiles of Beta(alpha, alpha) at 0, 1 / 8192, ..., 1; float32."""
    return special.betaincinv(alpha, alpha, np.linspace(0, 1, 8193)).astype(np.float32)


def _blend(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Blend `x` with its reversal along the first axis."""
    return (1 - weight) * x + weight * x[::-1]
