"""Inverse p-th roots and eigenbases of stacks of symmetric positive semi-definite matrices (N, n, n).

`eigh` is exact, and used by the PyTorch reference. `newton` and `gram_schmidt` consist of a fixed number of matrix
products, for accelerators, where latency bounds decompositions.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .options import LEAST_EPS, Basis, Number, Root

_PANEL = 32  # columns that are orthogonalized one by one
# The iteration must not push large eigenvalues below this fraction of the largest, or rounding swamps them.
_LEAST_IMAGE = 0.8


def inverse_pth_root(
    statistics: jax.Array, p: int, *, eps: Number, relative_eps: bool = True, root: Root = "auto"
) -> tuple[jax.Array, jax.Array]:
    """Compute (A + d I)^(-1/p) for each matrix of a stack, and its error.

    The damping d is eps or, if relative, eps ||A||_F. An absolute eps may be below rounding, so the smallest eigenvalue
    is subtracted first if it is negative, and then eps is added, as in the PyTorch reference.

    Args:
      statistics: A (N, n, n), symmetric positive semi-definite, float32 or float64.
      p: The root, >= 1.
      eps: The damping. A relative one that is scheduled is raised to what the type of A can resolve.
      relative_eps: Whether eps is in units of ||A||_F.
      root: 'eigh', 'newton', or 'auto': 'eigh' on a CPU and if eps is absolute, else 'newton'.

    Returns:
      The roots X (N, n, n), and their `backward_error` (N,), which is 0 for finite roots if eps is absolute. With a
      relative eps a zero matrix, which has no scale, counts as I.

    References:
      Shampoo, arXiv 1802.09568, algorithm 1; Guo and Higham, A Schur-Newton method for the matrix p-th root and its
      inverse, SIAM J. Matrix Anal. Appl. 28(3), 2006, for the coupled iteration.
    """
    # Rounding of TF32 or bfloat16 products breaks roots: with them the iteration diverges.
    with jax.default_matmul_precision("highest"):
        if not relative_eps:
            eigenvalues, vectors = eigh(statistics)
            # In two steps, because in a single sum the rounding of a large smallest eigenvalue would absorb eps.
            eigenvalues = (eigenvalues - jnp.minimum(eigenvalues[:, :1], 0)) + eps
            roots = _spectral_power(eigenvalues, vectors, -1 / p)
            return roots, jnp.where(jnp.isfinite(roots).all((1, 2)), 0, jnp.inf).astype(jnp.float32)
        if isinstance(eps, jax.Array):
            eps = jnp.maximum(eps, LEAST_EPS[statistics.dtype.name])
        unit, norm = normalize(statistics)
        damped = unit + eps * jnp.eye(statistics.shape[-1], dtype=statistics.dtype)[None]

        def by_eigh(damped: jax.Array) -> jax.Array:
            # Damp before the decomposition, not after, so that rounding does not reach the eigenvalues damping makes.
            eigenvalues, vectors = eigh(damped)
            return _spectral_power(jnp.maximum(eigenvalues, eps / 2), vectors, -1 / p)

        def by_newton(damped: jax.Array) -> jax.Array:
            return _newton_root(damped, p, eps)

        if root == "auto":  # LAPACK is faster on a CPU, matrix products elsewhere
            roots = jax.lax.platform_dependent(damped, cpu=by_eigh, default=by_newton)
        else:
            roots = {"eigh": by_eigh, "newton": by_newton}[root](damped)
        return jnp.where(norm == 0, 1, norm) ** (-1 / p) * roots, backward_error(roots, damped, p)


def one_by_one(decompose: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """Make a decomposition of stacks that takes one matrix after another on a CPU.

    A batched decomposition of jaxlib blocks a thread of XLA's pool until other threads have done its parts. Several
    together, of two sizes, devices or programs, can deadlock on few cores (QR, jaxlib 0.10.2). `decompose` takes
    matrices (..., n, n), the result a stack (N, n, n), also within `jax.vmap`.
    """
    single = jax.vmap(jax.custom_batching.sequential_vmap(decompose))
    return lambda matrices: jax.lax.platform_dependent(matrices, cpu=single, default=decompose)


eigh = one_by_one(lambda matrices: tuple(jnp.linalg.eigh(matrices)))
qr = one_by_one(lambda matrices: jnp.linalg.qr(matrices)[0])


def normalize(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Divide each matrix (N, n, n) by its Frobenius norm, given as (N, 1, 1); I stands for zero matrices."""
    norm = frobenius_norm(matrices)
    identity = jnp.eye(matrices.shape[-1], dtype=matrices.dtype)[None]
    return jnp.where(norm == 0, identity, matrices / jnp.where(norm == 0, 1, norm)), norm


def frobenius_norm(matrices: jax.Array) -> jax.Array:
    """Compute ||A||_F of each matrix (N, n, n) as (N, 1, 1), without underflow of the squares."""
    largest = jnp.max(jnp.abs(matrices), axis=(-2, -1), keepdims=True)
    unit = matrices / jnp.where(largest == 0, 1, largest)
    return largest * jnp.sqrt(jnp.sum(jnp.square(unit), axis=(-2, -1), keepdims=True))


def backward_error(root: jax.Array, matrix: jax.Array, p: int) -> jax.Array:
    """Compute ||A - A X^p A||_F / ||A||_F for roots X and matrices A (N, n, n): float32 (N,).

    To first order, X is the exact root of a matrix at this distance from A. Rounding does not change it, while the
    forward residual X^p A - I grows with the condition number: 0.15 for a root whose steps are right to 4e-4.
    """
    product = matrix
    if p > 1:
        half = jnp.linalg.matrix_power(root, p // 2)
        product = half @ (half @ product)
    if p % 2:
        product = root @ product
    # Transposed, or XLA for CPUs (jaxlib 0.10) takes the products into the norm, where it computes them over and over.
    error = (matrix @ product).mT - matrix
    return (frobenius_norm(error) / frobenius_norm(matrix))[:, 0, 0].astype(jnp.float32)


def _spectral_power(eigenvalues: jax.Array, vectors: jax.Array, exponent: float) -> jax.Array:
    return (vectors * (eigenvalues**exponent)[:, None, :]) @ vectors.mT


def _newton_root(matrix: jax.Array, p: int, eps: Number) -> jax.Array:
    """Run the coupled iteration X <- X h(M), M <- h(M)^p M, with h(M) = a I - b M, from X = I and M = A (N, n, n).

    M = X^p A throughout, so that X is the root once M = I. Newton's own (a, b) = ((p+1)/p, 1/p) is slow on small
    eigenvalues; `newton_coefficients` chooses each pair for the spectrum that is left. M is updated as a congruence,
    h^(p/2) M h^(p/2), which keeps rounding symmetric. The eigenvalues of A must be in [eps, 1 + eps].
    """
    identity = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)[None]
    bound = 1 + eps
    lowest = LEAST_EPS[matrix.dtype.name] if isinstance(eps, jax.Array) else eps / bound
    coefficients = jnp.asarray(newton_coefficients(p, lowest), matrix.dtype)

    def body(carry: tuple[jax.Array, jax.Array], pair: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        x, m = carry
        h = pair[0] * identity - pair[1] * m
        if p > 1:
            half = jnp.linalg.matrix_power(h, p // 2)
            m = half @ m @ half
        if p % 2:
            m = h @ m
        return (x @ h, m), None

    # I is made from the matrix, so that within `jax.shard_map` it varies over the same devices.
    start = (jnp.zeros_like(matrix) + identity, matrix / bound)
    (root, _), _ = jax.lax.scan(body, start, coefficients)
    # Remove the asymmetry left by rounding, which would matter when the root is applied on two sides.
    return bound ** (-1 / p) * (root + root.mT) / 2


@functools.cache
def newton_coefficients(p: int, lowest: float) -> np.ndarray:
    """Choose the coefficients (a, b) of each step of the coupled iteration.

    An eigenvalue m = y^p of M becomes (y (a - b y^p))^p. For y in [l, 1] the best step makes the smallest image as
    large as possible while the largest is 1. Both ends then map to the same, nearly zero value, and rounding would
    swamp the largest eigenvalues, so the image of 1 is kept above a bound. The new l is known exactly, which fixes the
    number of steps in advance. A last step of Newton's own makes the convergence quadratic.

    Args:
      p: The root, >= 1.
      lowest: The smallest eigenvalue of M over the largest, in (0, 1).

    Returns:
      (steps, 2) in float64: 11 steps for p = 4 and lowest = 1e-6.
    """
    low, steps = lowest ** (1 / p), []

    def greatest_image(c: float) -> float:  # max over y of y (1 - c y^p)
        return (1 / ((p + 1) * c)) ** (1 / p) * p / (p + 1)

    # 1 - c falls, and so does its ratio to the largest image: bisect for the bound.
    least_c, most_c = 1 / (p + 1), 1.0
    for _ in range(60):
        middle = (least_c + most_c) / 2
        if 1 - middle > _LEAST_IMAGE * greatest_image(middle):
            least_c = middle
        else:
            most_c = middle
    while 1 - low > 1e-3:
        equal_ends = (1 - low) / (1 - low ** (p + 1))
        c = min(equal_ends, least_c)
        a = 1 / greatest_image(c)
        steps.append((a, a * c))
        low = a * min(low * (1 - c * low**p), 1 - c)
    steps.append(((p + 1) / p, 1 / p))
    return np.array(steps)


def refresh_basis(statistics: jax.Array, basis: jax.Array, method: Basis) -> tuple[jax.Array, jax.Array]:
    """Compute bases that are closer to the eigenvectors of the statistics.

    One step of orthogonal iteration, Q <- orth(A Q), follows slowly moving statistics near an eigenbasis, and finds one
    from the identity in a few refreshes. 'eigh' computes the eigenvectors outright.

    Args:
      statistics: A (N, n, n), symmetric positive semi-definite.
      basis: Q (N, n, n), orthogonal, eigenvectors in columns.
      method: Orthogonalization of the product, or 'eigh'; 'auto' is 'qr' on a CPU, else 'gram_schmidt'.

    Returns:
      The new Q (N, n, n), and its distance from orthogonality, ||Q^T Q - I||_F / sqrt(n) (N,), in float32. A zero
      matrix keeps its basis, up to signs.

    References:
      SOAP, arXiv 2409.11321, algorithms 3 and 4.
    """
    n = statistics.shape[-1]
    identity = jnp.eye(n, dtype=statistics.dtype)[None]
    unit, norm = normalize(statistics)
    with jax.default_matmul_precision("highest"):
        if method == "eigh":
            new = jnp.where(norm == 0, basis, eigh(unit)[1])
        else:
            # Along directions without any gradient the product would be rounding errors, so they stay as they are.
            moved = unit @ basis + jnp.finfo(unit.dtype).eps * basis
            if method == "auto":
                new = jax.lax.platform_dependent(moved, cpu=qr, default=gram_schmidt)
            else:
                new = {"qr": qr, "gram_schmidt": gram_schmidt}[method](moved)
        error = new.mT @ new - identity
    return new, (jnp.linalg.norm(error, axis=(-2, -1)) / n**0.5).astype(jnp.float32)


def gram_schmidt(matrices: jax.Array) -> jax.Array:
    """Compute the Q of QR decompositions (with a positive diagonal of R) with matrix products only.

    The matrices (N, n, n) must have full rank. Panels of columns are projected twice against all columns before them
    ("twice is enough"), and within a panel each column against those before it. A last step of Newton-Schulz removes
    the remaining rounding errors. All loops have a known length, because the host controls batched QR decompositions on
    accelerators, which are bound by latency.
    """
    n = matrices.shape[-1]
    width = min(_PANEL, n)
    panels = -(-n // width)
    padded = jnp.pad(matrices, ((0, 0), (0, 0), (0, panels * width - n)))

    def add_columns(done: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(done, new, start, axis=2)

    def project(new: jax.Array, done: jax.Array) -> jax.Array:
        for _ in range(2):
            new = new - done @ (done.mT @ new)
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
    return 1.5 * basis - 0.5 * (basis @ (basis.mT @ basis))
