"""Eigenbases of stacks of statistics, tracked over time, and second moments carried between them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from simplest_vit.optimizers.shampoo.options import ShampooOptions
from simplest_vit.optimizers.shampoo.roots import frobenius_norm
from simplest_vit.optimizers.shampoo.statistics import multiply_axes

_HIGHEST = jax.lax.Precision.HIGHEST


def refresh_basis(
    statistics: jax.Array, basis: jax.Array, is_first: jax.Array, options: ShampooOptions
) -> tuple[jax.Array, jax.Array]:
    """Returns bases that are closer to the eigenvectors of the statistics.

    One step of orthogonal iteration, Q <- qr(A Q): near an eigenbasis it follows slowly moving
    statistics. The first basis, and every one with basis='eigh', is computed outright.

    Args:
        statistics: A (N, n, n), symmetric positive semi-definite.
        basis: Q (N, n, n), orthogonal, eigenvectors in columns.
        is_first: A scalar, whether `basis` is not an eigenbasis yet.
        options: The settings; `basis` is used.

    Returns:
        The new Q (N, n, n), and how far it is from orthogonal, ||Q^T Q - I||_F / sqrt(n) (N,), in
        float32. A zero matrix keeps its basis, but for signs.

    References:
        SOAP, arXiv 2409.11321, algorithms 3 and 4.
    """
    n = statistics.shape[-1]
    identity = jnp.eye(n, dtype=statistics.dtype)[None]
    norm = frobenius_norm(statistics)
    unit = jnp.where(norm == 0, identity, statistics / jnp.where(norm == 0, 1, norm))

    def outright() -> jax.Array:
        return jnp.where(norm == 0, basis, jnp.linalg.eigh(unit)[1][..., ::-1])  # largest first

    def iterate() -> jax.Array:
        return _orthogonalize(jnp.matmul(unit, basis, precision=_HIGHEST))

    new = outright() if options.basis == "eigh" else jax.lax.cond(is_first, outright, iterate)
    error = jnp.matmul(new.mT, new, precision=_HIGHEST) - identity
    return new, (jnp.linalg.norm(error, axis=(-2, -1)) / n**0.5).astype(jnp.float32)


def _orthogonalize(matrices: jax.Array) -> jax.Array:
    """Returns the Q (N, n, n) of the QR decompositions of a stack.

    On CPU one matrix after the other: two batched QRs at once, of two classes or two devices, wait for each other for
    ever on two cores (jaxlib 0.10.2: a batched QR blocks a thread of the pool that its parts need).
    """

    def batched(matrices: jax.Array) -> jax.Array:
        return jnp.linalg.qr(matrices)[0]

    return jax.lax.platform_dependent(matrices, cpu=lambda matrices: jax.lax.map(batched, matrices), default=batched)


def rotate(blocks: jax.Array, bases: Sequence[jax.Array], options: ShampooOptions) -> jax.Array:
    """Returns blocks (N, *block_shape) in the coordinates of their bases; for matrices Q_L^T G Q_R."""
    return multiply_axes(blocks, [basis.mT for basis in bases], options)


def carry_second_moment(
    moment: jax.Array, old: Sequence[jax.Array], new: Sequence[jax.Array], options: ShampooOptions
) -> jax.Array:
    """Returns second moments of the coordinates in new bases, from those in the old ones.

    Exact for uncorrelated coordinates: variances add with the squares of the rotation's entries. Where
    the basis barely moves, or its vectors only change places, they move along with the vectors.

    Args:
        moment: (N, *block_shape).
        old: For each axis the bases (N, n, n) that it belongs to.
        new: For each axis the new bases.
        options: The settings.

    Returns:
        (N, *block_shape), with the same sum for each block.
    """
    turns = [jnp.matmul(after.mT, before, precision=_HIGHEST) for before, after in zip(old, new, strict=True)]
    return multiply_axes(moment, [jnp.square(turn) for turn in turns], options)
