"""RandAugment on the device: the 14 operations of torchvision, equal to PIL's pixel by pixel.

There are three kinds of operation, and each is one computation:

- geometric: an affine warp by the operation's matrix, nearest neighbour, black outside;
- blend: mix with a degenerate image, grey or smoothed;
- table: new values looked up per channel.

All arithmetic is integer, or float32 arranged so that it rounds as PIL does.

References:
  Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space", 2020.
"""

import enum
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

_BINS = 31  # magnitudes are 0..30


class Operation(enum.IntEnum):
    """The operations, in torchvision's order."""

    IDENTITY = 0
    SHEAR_X = 1
    SHEAR_Y = 2
    TRANSLATE_X = 3
    TRANSLATE_Y = 4
    ROTATE = 5
    BRIGHTNESS = 6
    COLOR = 7
    CONTRAST = 8
    SHARPNESS = 9
    POSTERIZE = 10
    SOLARIZE = 11
    AUTO_CONTRAST = 12
    EQUALIZE = 13


# The computation that each operation needs: none, warp, blend with grey, blend with smoothed, table.
_KINDS = np.array([0, 1, 1, 1, 1, 1, 4, 2, 4, 3, 4, 4, 4, 4])
_TABLE = 4


def rand_augment(key: jax.Array, images: jax.Array, num_ops: int, magnitude: int) -> jax.Array:
    """Apply `num_ops` random operations of a magnitude 0..30 to each image, uint8 [B, H, W, C], C = 1 or 3.

    Each is drawn uniformly from the 14; if it has a direction, both are equally likely.
    """
    operation_key, sign_key = jax.random.split(key)
    shape = (num_ops, len(images))
    operations = jax.random.randint(operation_key, shape, 0, len(Operation))
    negative = jax.random.bernoulli(sign_key, 0.5, shape)
    # A loop, not unrolled: it is compiled once, and each round is stored before the next reads it.
    return jax.lax.fori_loop(
        0, num_ops, lambda i, x: apply_operations(x, operations[i], negative[i], magnitude), images
    )


def apply_operations(images: jax.Array, operation: jax.Array, negative: jax.Array, magnitude: int) -> jax.Array:
    """Apply to each image the operation given for it.

    Args:
      images: uint8 [B, H, W, C], C = 1 or 3.
      operation: int32 [B], values of `Operation`.
      negative: bool [B]; whether to shear, translate, rotate or enhance in the opposite direction.
      magnitude: 0..30.
    """
    batch = (images, operation, negative.astype(jnp.int32))

    def apply(example: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return _apply_operation(*example, magnitude)

    # An accelerator computes each kind once for the whole batch and selects. A CPU gains nothing from
    # that: image by image it computes only what is needed.
    return jax.lax.platform_dependent(batch, cpu=lambda batch: jax.lax.map(apply, batch), default=jax.vmap(apply))


def _apply_operation(image: jax.Array, operation: jax.Array, negative: jax.Array, magnitude: int) -> jax.Array:
    """Apply one operation to an image [H, W, C]; `negative` is 0 or 1."""
    return jax.lax.switch(
        jnp.asarray(_KINDS)[operation],
        [
            lambda: image,
            lambda: _warp(image, operation, negative, magnitude),
            lambda: _blend(_grey(image), image, _factor(negative, magnitude)),
            lambda: _sharpen(image, _factor(negative, magnitude)),
            lambda: _look_up(image, operation, negative, magnitude),
        ],
    )


def _affine_coefficients(height: int, width: int, magnitude: int) -> np.ndarray:
    """Compute PIL's fixed-point coefficients of each operation and sign, int32 [14, 2, 6].

    A row (a, b, c, d, e, f) takes the output pixel (x, y) from the input pixel
    ((a x + b y + c) >> 16, (d x + e y + f) >> 16).
    """
    strength = magnitude / (_BINS - 1)
    shear, angle = 0.3 * strength, math.radians(30 * strength)
    shift_x, shift_y = int(150 / 331 * width * strength), int(150 / 331 * height * strength)

    cos, sin = math.cos(angle), math.sin(angle)
    x, y = width / 2, height / 2  # the centre stays where it is
    matrices = np.tile(np.array([1, 0, 0, 0, 1, 0], np.float64), (len(Operation), 2, 1))
    for i, sign in enumerate((1, -1)):
        matrices[Operation.SHEAR_X, i, 1] = sign * shear
        matrices[Operation.SHEAR_Y, i, 3] = sign * shear
        matrices[Operation.TRANSLATE_X, i, 2] = -sign * shift_x
        matrices[Operation.TRANSLATE_Y, i, 5] = -sign * shift_y
        turned = cos, -sign * sin, x - cos * x + sign * sin * y, sign * sin, cos, y - sign * sin * x - cos * y
        matrices[Operation.ROTATE, i] = turned
    # Pixel centres lie at half-integers.
    matrices[..., 2] += (matrices[..., 0] + matrices[..., 1]) / 2
    matrices[..., 5] += (matrices[..., 3] + matrices[..., 4]) / 2
    return np.floor(matrices * 2**16 + 0.5).astype(np.int32)


def _warp(image: jax.Array, operation: jax.Array, negative: jax.Array, magnitude: int) -> jax.Array:
    """Apply a geometric operation to an image [H, W, C]."""
    height, width, _ = image.shape
    coefficients = jnp.asarray(_affine_coefficients(height, width, magnitude))
    a, b, c, d, e, f = coefficients[operation, negative]
    x, y = jnp.arange(width)[None, :], jnp.arange(height)[:, None]
    source_x = (a * x + b * y + c) >> 16
    source_y = (d * x + e * y + f) >> 16
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    return jnp.where(inside[..., None], image[source_y, source_x], jnp.zeros((), image.dtype))


def _factor(negative: jax.Array, magnitude: int) -> jax.Array:
    """Compute the weight of the image against the degenerate one, float32 scalar: 1 plus or minus 0.9 * magnitude / 30.

    Bit-identical to torchvision's, whose float32 `linspace` counts from its nearer end.
    """
    step = float(np.float32(0.9) / np.float32(_BINS - 1))
    from_start, from_end = step * magnitude, float(np.float32(0.9)) - step * (_BINS - 1 - magnitude)
    change = float(np.float32(from_start if magnitude < _BINS // 2 else from_end))
    return jnp.where(negative, np.float32(1 - change), np.float32(1 + change))


def _grey(image: jax.Array) -> jax.Array:
    """Convert an image to grey as PIL does: int32 [H, W, 1]."""
    x = image.astype(jnp.int32)
    if x.shape[2] == 1:
        return x
    return (x[..., :1] * 19595 + x[..., 1:2] * 38470 + x[..., 2:] * 7471 + 0x8000) >> 16


def _sharpen(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Blend an image with PIL's SMOOTH filter of it: 3 x 3 ones with a centre of 5. The border is kept."""
    height, width, c = image.shape
    flat = image.reshape(height, width * c)  # rows without gaps, which a CPU takes several pixels at a time
    x = flat.astype(jnp.float32)
    rows = x[:-2] + x[1:-1] + x[2:]
    total = rows[:, : -2 * c] + rows[:, c:-c] + rows[:, 2 * c :] + 4 * x[1:-1, c:-c]
    smooth = jnp.floor(total * (1 / 13) + 0.5)  # never closer than 1 / 26 to an integer
    return flat.at[1:-1, c:-c].set(_blend(smooth, flat[1:-1, c:-c], factor)).reshape(image.shape)


def _blend(degenerate: jax.Array, image: jax.Array, factor: jax.Array) -> jax.Array:
    """Compute clip(degenerate + factor * (image - degenerate)), rounded down, as PIL does in float32.

    The factor is split into two parts whose products are exact, so that a compiler that fuses multiplication and
    addition gets the same bits as one that does not. `degenerate` holds integers and may be broadcast.
    """
    high = jnp.round(factor * 2**12) / 2**12
    low = factor - high
    degenerate = degenerate.astype(jnp.float32)
    difference = image.astype(jnp.float32) - degenerate
    change = high * difference + low * difference
    return jnp.clip(degenerate + change, 0, 255).astype(jnp.int32).astype(image.dtype)


def _look_up(image: jax.Array, operation: jax.Array, negative: jax.Array, magnitude: int) -> jax.Array:
    """Replace each value of an image [H, W, C] by its entry in the operation's table."""
    channels = image.shape[2]
    values = np.arange(256)
    bits = 8 - round(magnitude / ((_BINS - 1) / 4))
    posterized = values & ~(2 ** (8 - bits) - 1)
    threshold = 255 - 255 / (_BINS - 1) * magnitude
    solarized = np.where(values < threshold, values, 255 - values)

    def of_all_channels(table: jax.Array | np.ndarray) -> jax.Array:
        return jnp.tile(jnp.asarray(table, jnp.int32), (channels, 1))

    def blended(degenerate: jax.Array | int) -> jax.Array:
        return of_all_channels(_blend(jnp.asarray(degenerate), jnp.asarray(values), _factor(negative, magnitude)))

    table = jax.lax.switch(
        jnp.asarray(np.cumsum(_KINDS == _TABLE) - 1)[operation],
        [
            lambda: blended(0),
            lambda: blended(_mean(_grey(image))),
            lambda: of_all_channels(posterized),
            lambda: of_all_channels(solarized),
            lambda: _auto_contrast_table(image.min((0, 1)), image.max((0, 1))),
            lambda: _equalize_table(_histogram(image)),
        ],
    )
    return table.astype(image.dtype)[jnp.arange(channels)[None, None], image]


def _mean(grey: jax.Array) -> jax.Array:
    """Compute the mean rounded to the nearest integer, halves up: int32 scalar."""
    return (2 * grey.sum() + grey.size) // (2 * grey.size)


def _histogram(image: jax.Array) -> jax.Array:
    """Count the values of each channel of an image [H, W, C], int32 [C, 256]."""
    channels = image.shape[2]
    bins = image.astype(jnp.int32) + 256 * jnp.arange(channels)[None, None]
    counts = jnp.zeros(channels * 256, jnp.int32).at[bins].add(1, mode="promise_in_bounds")
    return counts.reshape(channels, 256)


def _equalize_table(histogram: jax.Array) -> jax.Array:
    """Compute PIL's equalization, int32 [C, 256]; the identity if there are too few pixels or values."""
    values = jnp.arange(256)[None]
    last = jnp.max(jnp.where(histogram > 0, values, 0), 1, keepdims=True)
    step = (histogram.sum(1, keepdims=True) - jnp.take_along_axis(histogram, last, 1)) // 255
    below = jnp.cumsum(histogram, 1) - histogram
    table = _divide(step // 2 + below, jnp.maximum(step, 1))
    return jnp.where(step == 0, values, jnp.minimum(table, 255))


def _auto_contrast_table(low: jax.Array, high: jax.Array) -> jax.Array:
    """Compute PIL's stretch of [low, high], uint8 [C], to [0, 255]: int32 [C, 256]; the identity if they are equal."""
    low, high = low.astype(jnp.int32), high.astype(jnp.int32)
    values = jnp.arange(256)[None]
    span = (high - low)[:, None]
    exact = _divide(255 * jnp.clip(values - low[:, None], 0, span), jnp.maximum(span, 1))
    shortfall = jnp.unpackbits(jnp.asarray(_auto_contrast_shortfall())[low, high], axis=1)
    return jnp.where(span == 0, values, exact - shortfall)


def _divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """Compute floor(a / b) of integers a >= 0 and b > 0, exact for a < 2**22; faster than integer division."""
    return jnp.floor((a + 0.5) / b).astype(jnp.int32)


@functools.cache
def _auto_contrast_shortfall() -> np.ndarray:
    """Find where PIL's float64 arithmetic falls just short of an integer and truncates it to one less.

    One bit for each lowest, highest and pixel value, packed along the last axis: uint8 [256, 256, 32].
    """
    values = np.arange(256)
    bits = np.zeros((256, 256, 32), np.uint8)
    for low in range(255):
        span = values[low + 1 :, None] - low
        scale = 255.0 / span
        truncated = (values * scale + -low * scale).astype(np.int64)
        short = (truncated < 255 * (values - low) // span) & (values >= low) & (values <= low + span)
        bits[low, low + 1 :] = np.packbits(short, axis=1)
    return bits
