"""Moving averages that are robust to a single bad gradient, and the diagonal methods based on them.

Grafting (arXiv 2002.11803; for Shampoo 2002.09018) takes the direction from Shampoo and the norm of each block's step
from a diagonal method. Both use the same momentum.
"""

import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from .options import Diagonal, Number, Options

SecondMoment: TypeAlias = jax.Array | optax.MaskedNode  # empty for the methods 'none' and 'sgd'


def accumulate(average: jax.Array, new: jax.Array, decay: Number) -> jax.Array:
    """Compute decay * average + (1 - decay) * new, or the plain sum (AdaGrad) if decay is 1."""
    return decay * average + jnp.where(decay == 1, 1, 1 - decay) * new


def bias_correction(decay: Number, count: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Compute 1 - decay^count, accurate to rounding even for few steps; 1 for sums (decay 1)."""
    wide = jnp.result_type(float)  # float64 if enabled
    if isinstance(decay, jax.Array):
        correction = -jnp.expm1(count.astype(wide) * jnp.log(decay.astype(wide)))
        return jnp.where(decay == 1, 1, correction).astype(dtype)
    if decay in (0, 1):
        return jnp.ones((), dtype)
    return -jnp.expm1(count.astype(wide) * math.log(decay)).astype(dtype)


def init_moments(like: Any, options: Options, diagonal: Diagonal) -> tuple[jax.Array, SecondMoment]:
    """Create the momentum in `mu_dtype` and, if the diagonal method has one, the second moment, both shaped `like`."""
    mu = jnp.zeros_like(like, options.momentum_dtype)
    return mu, jnp.zeros_like(like, options.dtype) if diagonal.has_second_moment else optax.MaskedNode()


def diagonal_step(
    count: jax.Array,
    moments: tuple[jax.Array, SecondMoment],
    gradient: jax.Array,
    finite: jax.Array,
    b1: Number,
    diagonal: Diagonal,
) -> tuple[tuple[jax.Array, SecondMoment], jax.Array, jax.Array]:
    """Update the moments: m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2; the step is m / (sqrt(v) + eps).

    Args:
      count: The number of this step, from 1.
      moments: m in any float type, without bias correction, and v if the diagonal method has one.
      gradient: Finite, of the shape of the moments. Entries whose squares overflow leave both moments unchanged.
      finite: Broadcasts to the gradient; where it is False, both moments are unchanged.

    Returns:
      The new moments, the momentum with bias correction, and the method's step before the learning rate.
    """
    mu, nu = moments
    dtype, square = gradient.dtype, jnp.square(gradient)
    finite = finite & jnp.isfinite(square)
    old = mu.astype(dtype)
    new = jnp.where(finite, accumulate(old, gradient, b1), old)
    momentum = new / bias_correction(b1, count, dtype)
    mu = new.astype(mu.dtype)
    if isinstance(nu, optax.MaskedNode):
        return (mu, nu), momentum, momentum
    second = accumulate(nu, square, diagonal.decay)
    nu = jnp.where(finite & jnp.isfinite(second), second, nu)
    corrected = nu / bias_correction(diagonal.decay, count, dtype) if diagonal.method == "adam" else nu
    return (mu, nu), momentum, momentum / (jnp.sqrt(corrected) + diagonal.eps)


def graft(direction: jax.Array, step: jax.Array) -> jax.Array:
    """Scale each block's direction (N, ...) to the norm of the diagonal method's step (N, ...)."""
    # Entries are clipped (in float32 near 1e14 in a block of 384 x 384) so that no sum of squares overflows.
    most = float(jnp.finfo(direction.dtype).max) ** 0.5 / max(direction[0].size, 1)
    direction, step = (jnp.clip(x, -most, most) for x in (direction, step))
    return direction * (_block_norms(step) / (_block_norms(direction) + 1e-16))


def _block_norms(blocks: jax.Array) -> jax.Array:
    """Compute the norm of each block, (N, ...) -> (N, 1, ...)."""
    return jnp.sqrt(jnp.sum(jnp.square(blocks), axis=tuple(range(1, blocks.ndim)), keepdims=True))
