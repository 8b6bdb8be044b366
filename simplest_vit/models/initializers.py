"""Weight initializers by the papers' names. Kernels are [in, out]; keys and dtypes as in `jax.nn.initializers`."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn.initializers import variance_scaling

# N(0, 1 / fan_in), not truncated.
gaussian_fan_in = variance_scaling(1.0, "fan_in", "normal")


def _orthogonal(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype, scale: float) -> jax.Array:
    # Stacked blocks would make this a batched QR, and two of those at once wait for each other for ever on a CPU of two
    # cores (jaxlib 0.10.2: a batched QR blocks a thread of the pool that its parts need).
    draw = jax.custom_batching.sequential_vmap(lambda key: jax.nn.initializers.orthogonal(scale)(key, shape, dtype))
    return draw(key)


def scaled_uniform_orthogonal(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """SUO (DKS, arXiv 2110.01765, appendix B): orthogonal times max(sqrt(out / in), 1).

    All singular values are equal, and random inputs keep their mean square in expectation.
    """
    fan_in, fan_out = shape
    return _orthogonal(key, shape, dtype, max(math.sqrt(fan_out / fan_in), 1.0))


def reference_orthogonal(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """The SUO of the PyTorch reference, which swaps in and out: orthogonal times max(sqrt(in / out), 1)."""
    fan_in, fan_out = shape
    return _orthogonal(key, shape, dtype, max(math.sqrt(fan_in / fan_out), 1.0))


def mirrored_kernels(key: jax.Array, width: int, hidden: int) -> tuple[jax.Array, jax.Array]:
    """Kernels [W, -W] and [V; -V] of an MLP that starts as the orthogonal map W V.

    With an activation phi(z) - phi(-z) = z the halves cancel everything but the linear part (looks-linear
    initialization, arXiv 1702.08591): (phi(x W) - phi(-x W)) V = x W V. W has orthonormal rows, and V = W^T Q with Q
    orthogonal.

    Args:
      key: Random key.
      width: D.
      hidden: M, even and at least 2 D.

    Returns:
      float32 [D, M] and [M, D].
    """
    for_w, for_q = jax.random.split(key)
    w = _orthogonal(for_w, (width, hidden // 2), jnp.float32, 1.0)
    v = w.T @ _orthogonal(for_q, (width, width), jnp.float32, 1.0)
    return jnp.concatenate([w, -w], axis=1), jnp.concatenate([v, -v], axis=0)


def uniform_fan_in(fan_in: int) -> Callable[..., jax.Array]:
    """PyTorch's default for linear layers, kernels and biases alike: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = 1.0 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)
