"""Eigenbases of stacks of statistics, tracked over time."""

import functools

import jax
import jax.numpy as jnp

from .options import Basis
from .roots import eigh, normalize, one_by_one

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
qr = one_by_one(lambda matrices: jnp.linalg.qr(matrices)[0])
_PANEL = 32  # columns that are orthogonalized one by one


def refresh_basis(statistics: jax.Array, basis: jax.Array, method: Basis) -> tuple[jax.Array, jax.Array]:
    """Compute bases that are closer to the eigenvectors of the statistics.

    One step of orthogonal iteration, Q <- orth(A Q), follows slowly moving statistics near an eigenbasis, and finds one
    from the identity in a few refreshes. 'eigh' computes the eigenvectors outright.

    Args:
      statistics: A (N, n, n), symmetric positive semi-definite.
      basis: Q (N, n, n), orthogonal, eigenvectors in columns.
      method: How the product is orthogonalized, or 'eigh'; 'auto' is 'qr' on a CPU, else 'gram_schmidt'.

    Returns:
      The new Q (N, n, n), and how far it is from orthogonal, ||Q^T Q - I||_F / sqrt(n) (N,), in float32. A zero matrix
      keeps its basis, but for signs.

    References:
      SOAP, arXiv 2409.11321, algorithms 3 and 4.
    """
    n = statistics.shape[-1]
    identity = jnp.eye(n, dtype=statistics.dtype)[None]
    unit, norm = normalize(statistics)
    if method == "eigh":
        new = jnp.where(norm == 0, basis, eigh(unit)[1])
    else:
        # Along directions without any gradient the product would be rounding errors: they stay as they are.
        moved = _matmul(unit, basis) + jnp.finfo(unit.dtype).eps * basis
        if method == "auto":
            new = jax.lax.platform_dependent(moved, cpu=qr, default=gram_schmidt)
        else:
            new = {"qr": qr, "gram_schmidt": gram_schmidt}[method](moved)
    error = _matmul(new.mT, new) - identity
    return new, (jnp.linalg.norm(error, axis=(-2, -1)) / n**0.5).astype(jnp.float32)


def gram_schmidt(matrices: jax.Array) -> jax.Array:
    """Compute the Q of QR decompositions (with a positive diagonal of R) by matrix products alone.

    Panels of columns are projected twice against all columns before them ("twice is enough"), and within a panel each
    column against those before it. A last step of Newton-Schulz repairs what rounding left. All loops have a known
    length, because the host controls batched QR decompositions on accelerators, which are bound by latency.

    Args:
      matrices: (N, n, n) of full rank.

    Returns:
      Q (N, n, n).
    """
    n = matrices.shape[-1]
    width = min(_PANEL, n)
    panels = -(-n // width)
    padded = jnp.pad(matrices, ((0, 0), (0, 0), (0, panels * width - n)))

    def add_columns(done: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(done, new, start, axis=2)

    def project(new: jax.Array, done: jax.Array) -> jax.Array:
        for _ in range(2):
            new = new - _matmul(done, _matmul(done.mT, new))
        return new

    def column(panel: jax.Array, done: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        new = project(jax.lax.dynamic_slice_in_dim(panel, index, 1, axis=2), done)
        norm = jnp.linalg.norm(new, axis=1, keepdims=True)
        return add_columns(done, new / jnp.where(norm == 0, 1, norm), index), None

    def next_panel(done: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        panel = project(jax.lax.dynamic_slice_in_dim(padded, index * width, width, axis=2), done)
        panel, _ = jax.lax.scan(functools.partial(column, panel), jnp.zeros_like(panel), jnp.arange(width))
        return add_columns(done, panel, index * width), None

    basis, _ = jax.lax.scan(next_panel, jnp.zeros_like(padded), jnp.arange(panels))
    basis = basis[..., :n]
    return 1.5 * basis - 0.5 * _matmul(basis, _matmul(basis.mT, basis))
