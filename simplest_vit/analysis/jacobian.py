"""Singular values of a network's Jacobian, from embedded tokens to the features after the last block.

The Jacobian has (T D)^2 entries and is never formed: Lanczos' method on J^T J with random starts gives a quadrature
whose nodes are squared singular values and whose weights are the shares of directions (Golub and Meurant, "Matrices,
Moments and Quadrature", 2010; for networks arXiv 1901.10159). An isometry has all its weight at 1.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.linalg import eigh_tridiagonal

from simplest_vit.models import ViT, layers

# Products with J^T J for each random start.
_ITERATIONS = 48
_STARTS = 4


def jacobian_spectrum(model: ViT, image: jax.Array, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Estimate the distribution of singular values at one image.

    Args:
      model: The model, in float32; so must be the precision of products.
      image: Normalized image [1, H, W, C].

    Returns:
      Singular values, float64 [n], ascending, and the share of directions of each, float64 [n], which sum to 1. In
      float32, values below about 3e-4 of the largest are rounding errors.
    """
    graphdef, state = nnx.split(model.blocks)
    x, spectra = model.embed(image), []
    for key in jax.random.split(jax.random.key(seed), _STARTS):
        tridiagonal = _lanczos(graphdef, nnx.as_pure(state), x, key, min(_ITERATIONS, x.size))
        diagonal, off_diagonal = np.asarray(tridiagonal, np.float64)
        eigenvalues, vectors = eigh_tridiagonal(diagonal, off_diagonal[:-1])
        spectra.append((np.sqrt(np.maximum(eigenvalues, 0.0)), vectors[0] ** 2))
    return merge_spectra(spectra)


def merge_spectra(spectra: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Merge distributions of equal weight, each as `jacobian_spectrum` returns it."""
    values, weights = (np.concatenate(parts) for parts in zip(*spectra, strict=True))
    order = np.argsort(values)
    return values[order], weights[order] / len(spectra)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _lanczos(graphdef: nnx.GraphDef, state: Any, x: jax.Array, key: jax.Array, iterations: int) -> jax.Array:
    """Compute the diagonal and off-diagonal of the tridiagonal form of J^T J at tokens x [1, T, D]: [2, iterations]."""

    def network(x: jax.Array) -> jax.Array:
        return layers.scan(nnx.merge(graphdef, state), x)

    _, transposed = jax.vjp(network, x)
    forward = jax.linear_transpose(transposed, x)  # not `jax.jvp`: some layers define only their gradient

    def product(vector: jax.Array) -> jax.Array:
        (image,) = forward((vector.reshape(x.shape),))
        return transposed(image)[0].ravel()

    def body(carry: tuple[jax.Array, jax.Array], index: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        basis, vector = carry
        basis = basis.at[index].set(vector)
        image = product(vector)
        diagonal = jnp.vdot(vector, image)
        for _ in range(2):  # once would leave rounding errors that grow
            image = image - basis.T @ (basis @ image)
        norm = jnp.linalg.norm(image)
        found_all = norm <= 1e-6 * jnp.abs(diagonal)  # an invariant space: what follows has no weight
        off_diagonal = jnp.where(found_all, 0.0, norm)
        return (basis, jnp.where(found_all, 0.0, image / norm)), (diagonal, off_diagonal)

    start = jax.random.normal(key, (x.size,))
    carry = jnp.zeros((iterations, x.size)), start / jnp.linalg.norm(start)
    return jnp.stack(jax.lax.scan(body, carry, jnp.arange(iterations))[1])
