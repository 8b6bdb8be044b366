"""RandAugment on the device against PIL itself, called as torchvision calls it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

from simplest_vit.data import rand_augment
from simplest_vit.data.rand_augment import Operation

# torch.linspace(0, 0.9, 31)[magnitude].item(), recorded from PyTorch 2.13.
ENHANCEMENTS = {0: 0.0, 10: 0.29999998211860657, 20: 0.5999999642372131, 27: 0.8100000023841858}


def torchvision_operation(image: Image.Image, operation: Operation, negative: bool, magnitude: int) -> Image.Image:
    """What `torchvision.transforms.RandAugment` does to a PIL image, in terms of PIL."""
    width, height = image.size
    strength = magnitude / 30
    sign = -1 if negative else 1
    affine = functools.partial(image.transform, image.size, Image.Transform.AFFINE, resample=Image.Resampling.NEAREST)
    match operation:
        case Operation.IDENTITY:
            return image
        case Operation.SHEAR_X:
            return affine((1, math.tan(math.atan(sign * 0.3 * strength)), 0, 0, 1, 0))
        case Operation.SHEAR_Y:
            return affine((1, 0, 0, math.tan(math.atan(sign * 0.3 * strength)), 1, 0))
        case Operation.TRANSLATE_X:
            return affine((1, 0, -int(sign * 150 / 331 * width * strength), 0, 1, 0))
        case Operation.TRANSLATE_Y:
            return affine((1, 0, 0, 0, 1, -int(sign * 150 / 331 * height * strength)))
        case Operation.ROTATE:
            return image.rotate(sign * 30 * strength, Image.Resampling.NEAREST)
        case Operation.POSTERIZE:
            return ImageOps.posterize(image, 8 - round(strength * 4))
        case Operation.SOLARIZE:
            return ImageOps.solarize(image, float(np.linspace(255, 0, 31)[magnitude]))
        case Operation.AUTO_CONTRAST:
            return ImageOps.autocontrast(image)
        case Operation.EQUALIZE:
            return ImageOps.equalize(image)
        case _:
            enhancement = getattr(ImageEnhance, operation.name.capitalize())
            return enhancement(image).enhance(1 + sign * ENHANCEMENTS[magnitude])


def photographs(size: tuple[int, int], count: int) -> np.ndarray:
    """Crops of scikit-learn's two photographs, some dim, some flat: uint8 [count, H, W, 3]."""
    rng = np.random.default_rng(0)
    height, width = size
    crops = []
    for i in range(count):
        photo = load_sample_images().images[i % 2]
        y, x = rng.integers(0, photo.shape[0] - height), rng.integers(0, photo.shape[1] - width)
        crop = photo[y : y + height, x : x + width]
        crops.append([crop, crop // 3 + 40, np.full_like(crop, 77)][0 if i % 4 else i // 4 % 3])
    return np.stack(crops)


apply_operations = jax.jit(rand_augment.apply_operations, static_argnums=3)


@pytest.mark.parametrize(
    ("size", "magnitude", "channels"),
    [((32, 32), 10, 3), ((48, 36), 27, 3), ((24, 40), 20, 1), ((32, 32), 0, 3)],
)
def test_every_operation_equals_pil(size, magnitude, channels):
    images = photographs(size, 24)[..., :channels]
    batch = np.concatenate([images] * 2 * len(Operation))
    operation = np.repeat(np.array(list(Operation)), 2 * len(images))
    negative = np.tile(np.repeat([False, True], len(images)), len(Operation))
    result = np.asarray(apply_operations(batch, operation, negative, magnitude))
    for i, image in enumerate(batch):
        pil = Image.fromarray(image if channels == 3 else image[..., 0])
        expected = torchvision_operation(pil, Operation(operation[i]), negative[i], magnitude)
        np.testing.assert_array_equal(
            result[i], np.asarray(expected).reshape(image.shape), str(Operation(operation[i]))
        )


def test_blend_equals_pil_for_every_pair_of_values_and_every_magnitude():
    degenerate, value = (x.astype(np.uint8) for x in np.mgrid[:256, :256])
    factors = [1 + sign * np.float32(0.03) * np.float32(m) for m in range(31) for sign in (1, -1)]
    factors = np.array(factors, np.float32)
    shape = (len(factors), 256, 256, 1)
    result = jax.jit(jax.vmap(rand_augment._blend))(
        jnp.broadcast_to(degenerate[None, ..., None].astype(np.int32), shape),
        jnp.broadcast_to(value[None, ..., None], shape),
        factors,
    )
    for blended, factor in zip(np.asarray(result), factors, strict=True):
        pil = Image.blend(Image.fromarray(degenerate), Image.fromarray(value), float(factor))
        np.testing.assert_array_equal(blended[..., 0], np.asarray(pil))


def test_auto_contrast_equals_pil_for_every_lowest_and_highest_value():
    values = np.arange(256, dtype=np.uint8)
    lows, highs = np.triu_indices(256)
    keep = slice(None, None, 17)  # coprime to the rows: all spans and levels occur
    lows, highs = lows[keep], highs[keep]
    tables = np.asarray(rand_augment._auto_contrast_table(jnp.asarray(lows), jnp.asarray(highs)))
    for low, high, table in zip(lows, highs, tables, strict=True):
        inside = values[low : high + 1]
        pil = ImageOps.autocontrast(Image.fromarray(inside[None]))
        np.testing.assert_array_equal(table[inside], np.asarray(pil)[0])


def test_the_branch_for_accelerators_gives_the_same():
    """Run here on the CPU: `vmap` over images instead of a loop."""
    images = photographs((32, 32), 28)
    operation, negative = np.tile(np.arange(14), 2), np.repeat([0, 1], 14)
    one = functools.partial(rand_augment._apply_operation, magnitude=10)
    vmapped = jax.jit(jax.vmap(one))(images, operation, negative)
    np.testing.assert_array_equal(apply_operations(images, operation, negative, 10), vmapped)


def test_two_rounds_draw_operations_and_signs_evenly():
    images = np.zeros((2000, 8, 8, 1), np.uint8)
    seen = []

    def record(x, operation, negative, magnitude):
        jax.debug.callback(lambda o, n: seen.append((o, n)), operation, negative)
        return x

    original = rand_augment.apply_operations
    rand_augment.apply_operations = record
    try:
        jax.block_until_ready(rand_augment.rand_augment(jax.random.key(0), images, 2, 10))
        jax.effects_barrier()
    finally:
        rand_augment.apply_operations = original
    assert len(seen) == 2
    for operation, negative in seen:
        counts = np.bincount(operation, minlength=14)
        assert 100 < counts.min() <= counts.max() < 190
        assert 0.46 < np.mean(negative) < 0.54
