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


def uniform_fan_in(fan_in: int) -> Callable[..., jax.Array]:
    """PyTorch's default for linear layers, kernels and biases alike: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = 1.0 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)
