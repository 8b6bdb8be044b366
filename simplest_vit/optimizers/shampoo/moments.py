"""Averages over time that no single bad gradient can spoil, and the diagonal methods made of them.

Grafting (arXiv 2002.11803; for Shampoo 2002.09018): the direction is Shampoo's and the norm of each block's step that
of a diagonal method. The first moment is shared: both work on the same filtered gradient.
"""

import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from .options import Diagonal, Number, Options

SecondMoment: TypeAlias = jax.Array | optax.MaskedNode  # nothing for the methods 'none' and 'sgd'


def accumulate(average: jax.Array, new: jax.Array, decay: Number) -> jax.Array:
    """Compute decay * average + (1 - decay) * new, or the plain sum (AdaGrad) where decay is 1."""
    return decay * average + jnp.where(decay == 1, 1, 1 - decay) * new


def bias_correction(decay: Number, count: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Compute 1 - decay^count, exact to rounding also for few steps; 1 for sums (decay 1)."""
    wide = jnp.result_type(float)  # float64 where that is enabled
    if isinstance(decay, jax.Array):
        correction = -jnp.expm1(count.astype(wide) * jnp.log(decay.astype(wide)))
        return jnp.where(decay == 1, 1, correction).astype(dtype)
    if decay in (0, 1):
        return jnp.ones((), dtype)
    return -jnp.expm1(count.astype(wide) * math.log(decay)).astype(dtype)


def init_moments(shape: tuple[int, ...], options: Options, preconditioned: bool) -> tuple[jax.Array, SecondMoment]:
    """Make the momentum in `mu_dtype` and, where the diagonal method has one, the second moment."""
    has_nu = options.diagonal(preconditioned).has_second_moment
    mu = jnp.zeros(shape, options.momentum_dtype)
    return mu, jnp.zeros(shape, options.dtype) if has_nu else optax.MaskedNode()


def filter_gradient(
    count: jax.Array, mu: jax.Array, gradient: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array]:
    """Take a gradient into the momentum.

    Args:
      count: The number of this step, from 1.
      mu: The average, without bias correction. Entries whose gradient is not finite, or overflows when squared, stay.
      gradient: Of the same shape.
      options: The settings.

    Returns:
      The new average in the type of the old, and the momentum with bias correction.
    """
    old = mu.astype(options.dtype)
    # Squares decide, so that momentum and second moments leave out the same entries.
    new = jnp.where(jnp.isfinite(jnp.square(gradient)), accumulate(old, gradient, options.b1), old)
    return new.astype(mu.dtype), new / bias_correction(options.b1, count, options.dtype)


def diagonal_step(
    count: jax.Array, nu: SecondMoment, gradient: jax.Array, momentum: jax.Array, diagonal: Diagonal
) -> tuple[SecondMoment, jax.Array]:
    """Take in one gradient and compute the diagonal method's own step, before the learning rate.

    Args:
      count: The number of this step, from 1.
      nu: The second moment; entries that turn non-finite stay as they are.
      gradient: Of the same shape.
      momentum: Bias-corrected.
      diagonal: The method.

    Returns:
      The new second moment, and the step.
    """
    if isinstance(nu, optax.MaskedNode):
        return nu, momentum
    nu = keep_finite(accumulate(nu, jnp.square(gradient), diagonal.decay), nu)
    corrected = nu / bias_correction(diagonal.decay, count, nu.dtype) if diagonal.method == "adam" else nu
    return nu, momentum / (jnp.sqrt(corrected) + diagonal.epsilon)


def keep_finite(new: jax.Array, old: jax.Array) -> jax.Array:
    """Take the new entries where they are finite and the old ones elsewhere."""
    return jnp.where(jnp.isfinite(new), new, old)


def sum_of_squares(blocks: jax.Array) -> jax.Array:
    """Sum the squares of each block: (N, ...) -> (N,)."""
    return jnp.sum(jnp.square(blocks), axis=tuple(range(1, blocks.ndim)))


def graft(direction: jax.Array, grafted: jax.Array) -> jax.Array:
    """Scale each block's direction (N, ...) to the norm of the grafted step (N, ...)."""
    ratio = jnp.sqrt(sum_of_squares(grafted)) / (jnp.sqrt(sum_of_squares(direction)) + 1e-16)
    return direction * ratio.reshape(-1, *[1] * (direction.ndim - 1))
