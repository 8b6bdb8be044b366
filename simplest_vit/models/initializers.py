"""Weight initializers by the papers' names. Kernels are [in, out]; keys and dtypes as in `jax.nn.initializers`."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn.initializers import variance_scaling, zeros

# N(0, 1 / fan_in), not truncated.
gaussian_fan_in = variance_scaling(1.0, "fan_in", "normal")


@functools.partial(jax.jit, static_argnums=(1, 2, 3))  # so that the next model does not compile the loop again
def _orthogonal(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype, scale: float) -> jax.Array:
    # Stacked blocks would make this a batched QR, and two of those together deadlock on a CPU of two cores (jaxlib
    # 0.10.2: a batched QR blocks a thread of the pool that its parts need).
    draw = jax.custom_batching.sequential_vmap(lambda key: jax.nn.initializers.orthogonal(scale)(key, shape, dtype))
    return draw(key)


def scaled_uniform_orthogonal(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Draw from SUO (DKS, arXiv 2110.01765, appendix B): orthogonal times max(sqrt(out / in), 1).

    All singular values are equal, and random inputs keep their mean square in expectation.
    """
    fan_in, fan_out = shape
    return _orthogonal(key, shape, dtype, max(math.sqrt(fan_out / fan_in), 1.0))


def reference_orthogonal(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Draw from the SUO of the PyTorch reference, which swaps in and out: orthogonal times max(sqrt(in / out), 1)."""
    fan_in, fan_out = shape
    return _orthogonal(key, shape, dtype, max(math.sqrt(fan_in / fan_out), 1.0))


def looks_linear_kernels(key: jax.Array, width: int, hidden: int) -> tuple[jax.Array, jax.Array]:
    """Draw kernels [W, -W] and [V; -V] of an MLP that starts as the orthogonal map W V (arXiv 1702.08591).

    With an activation phi(z) - phi(-z) = z the halves cancel everything but the linear part:
    (phi(x W) - phi(-x W)) V = x W V. W has orthonormal rows, and V = W^T Q with Q orthogonal.

    The width is D and `hidden` M, even and at least 2 D; the kernels are float32 [D, M] and [M, D].
    """
    w_key, q_key = jax.random.split(key)
    w = _orthogonal(w_key, (width, hidden // 2), jnp.float32, 1.0)
    v = w.T @ _orthogonal(q_key, (width, width), jnp.float32, 1.0)
    return jnp.concatenate([w, -w], axis=1), jnp.concatenate([v, -v], axis=0)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _mimetic_factors(key: jax.Array, width: int, rank: int, alpha: float, beta: float) -> tuple[jax.Array, jax.Array]:
    """Draw L and R [D, r]; L R^T is the best approximation of rank r of alpha Z + beta I, with Z_ij ~ N(0, 1 / D)."""

    @jax.custom_batching.sequential_vmap  # as in `_orthogonal`
    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        product = alpha * jax.random.normal(key, (width, width)) * width**-0.5 + beta * jnp.eye(width)
        left, scale, right = jnp.linalg.svd(product)
        root = jnp.sqrt(scale[:rank])[None]
        return left[:, :rank] * root, right[:rank].T * root

    return draw(key)


def mimetic_kernels(key: jax.Array, width: int, num_heads: int) -> dict[str, jax.Array]:
    """Draw the kernels of attention by mimetic initialization (arXiv 2305.09828, section 3).

    The product of queries and keys is near 0.7 (Z + I) in each head, of values and output projection 0.4 (Z - I).

    Args:
      key: Key.
      width: D.
      num_heads: H, a divisor of D.

    Returns:
      `query`, `key`, `value` and `out`, float32 [D, D].
    """
    *head_keys, value_key = jax.random.split(key, num_heads + 1)
    heads = [_mimetic_factors(head_key, width, width // num_heads, 0.7, 0.7) for head_key in head_keys]
    query, keys = (jnp.concatenate(factors, axis=1) for factors in zip(*heads, strict=True))
    value, out = _mimetic_factors(value_key, width, width, 0.4, -0.4)
    return {"query": query, "key": keys, "value": value, "out": out.T}


def uniform_fan_in(
    key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32, fan_in: int | None = None
) -> jax.Array:
    """Draw PyTorch's default for linear layers, U(-1/sqrt(fan_in), 1/sqrt(fan_in)); `fan_in` defaults to shape[0]."""
    bound = 1.0 / math.sqrt(fan_in or shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class Init(NamedTuple):
    """Initializers of a network."""

    linear: Callable  # kernels that no nonlinearity follows: patch embedding, values, output projection
    keys: Callable  # kernels of keys, and of queries that do not start at zero
    dense: Callable  # kernels of MLP and head
    bias: Callable[[int], Callable] = lambda fan_in: zeros  # fan_in -> initializer of a bias
    # key, D, H -> kernels of attention that are drawn together; they replace those above.
    attention: Callable[[jax.Array, int, int], dict[str, jax.Array]] | None = None
    preserves_kernels: bool = True  # whether `linear` keeps mean products of tokens in the limit of infinite width


INITS = {
    "espa_tat": Init(gaussian_fan_in, gaussian_fan_in, scaled_uniform_orthogonal),
    "reference": Init(gaussian_fan_in, gaussian_fan_in, reference_orthogonal),
    "orthogonal": Init(scaled_uniform_orthogonal, gaussian_fan_in, scaled_uniform_orthogonal),
    "pytorch": Init(
        uniform_fan_in,
        uniform_fan_in,
        uniform_fan_in,
        bias=lambda fan_in: functools.partial(uniform_fan_in, fan_in=fan_in),
        preserves_kernels=False,
    ),
}
INITS["mimetic"] = INITS["pytorch"]._replace(attention=mimetic_kernels)
