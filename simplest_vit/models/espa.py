r"""E-SPA: attention that preserves the signal at initialization, and its relatives.

A deep stack of attention layers without skip connections drives all tokens to the same vector. Signal-preserving
attention (SPA) of He et al., "Deep Transformers without Shortcuts" (arXiv 2302.10322), avoids that. It chooses token
kernels Sigma_0 = I, ..., Sigma_L and gives block l the attention matrix that maps Sigma_{l-1} to Sigma_l. Rows of a
softmax sum to 1, so the matrix is factored:

    A_l = diag(row_scale_l) softmax(attention_bias_l)

This is exact at initialization, when queries are zero. Everything here is float64 NumPy and runs once.

Forms (kinds of attention in `model.attention`):
  espa            exponential kernel exp(-gamma_l |i - j|) in raster order, symmetric square roots
  espa_2d         exponential in rows and in columns: the Kronecker product of two 1-D kernels (not in any paper)
  uspa            uniform kernel (1 - rho_l) I + rho_l 1 1^T
  espa_reference  `espa` with the bias of the PyTorch reference, which divides columns instead of rows. It misses A_l by
                  up to 0.06 at T = 64, and exists so that reference checkpoints evaluate identically
"""

import functools

import numpy as np

# Entries of A_l are positive in exact arithmetic but fall below float64 rounding, which can make them negative. A floor
# of 1e-12 moves a row of 256 tokens by less than 3e-10.
FLOOR = 1e-12


def gamma_schedule(depth: int, gamma_max_depth: float) -> np.ndarray:
    """Compute decay rates gamma_1 .. gamma_L, float64 [L], falling to `gamma_max_depth` > 0 (gamma_0 is infinite).

    The Cholesky factor of Sigma_l has the diagonal sqrt(1 - exp(-2 gamma_l)) after its first row. It shrinks by the
    same factor in every block, so all blocks mix tokens equally strongly; small values mix more.
    """
    exponent = np.arange(1, depth + 1) / depth
    return -0.5 * np.log1p(-((-np.expm1(-2.0 * gamma_max_depth)) ** exponent))


def rho_schedule(depth: int, rho_max_depth: float) -> np.ndarray:
    """Compute correlations rho_1 .. rho_L of U-SPA, float64 [L], growing to `rho_max_depth` in (0, 1) (rho_0 = 0).

    The kernel is the paper's. The schedule follows the principle of `gamma_schedule`: far from the first row the
    Cholesky factor of Sigma_l has the diagonal sqrt(1 - rho_l), which shrinks by the same factor in each block.
    """
    return 1.0 - (1.0 - rho_max_depth) ** (np.arange(1, depth + 1) / depth)


def exponential_kernel(num_tokens: int, gamma: float) -> np.ndarray:
    """Return the kernel Sigma[i, j] = exp(-gamma |i - j|), float64 [T, T]."""
    position = np.arange(num_tokens)
    return np.exp(-gamma * np.abs(position[:, None] - position[None, :]))


def kernel_matrices(grid: tuple[int, int], depth: int, at_max_depth: float = 0.005, form: str = "espa") -> np.ndarray:
    """Compute the token kernels Sigma_0 .. Sigma_L that attention alone produces at initialization.

    Args:
      grid: Rows and columns of tokens; T = rows * columns, in raster order.
      depth: Number of blocks L.
      at_max_depth: gamma_L, or rho_L for `uspa`.
      form: As above.

    Returns:
      float64 [L + 1, T, T], Sigma_0 = I.
    """
    rows, columns = grid
    eye = np.eye(rows * columns)
    if form == "uspa":
        return np.stack([eye, *((1.0 - rho) * eye + rho for rho in rho_schedule(depth, at_max_depth))])
    gammas = gamma_schedule(depth, at_max_depth)
    if form == "espa_2d":
        kernels = [np.kron(exponential_kernel(rows, g), exponential_kernel(columns, g)) for g in gammas]
    else:
        kernels = [exponential_kernel(rows * columns, g) for g in gammas]
    return np.stack([eye, *kernels])


def attention_matrices(
    grid: tuple[int, int], depth: int, at_max_depth: float = 0.005, form: str = "espa"
) -> np.ndarray:
    """Compute attention matrices A_1 .. A_L with A_l Sigma_{l-1} A_l^T = Sigma_l; arguments as in `kernel_matrices`.

    A_l = Sigma_l^(1/2) Sigma_{l-1}^(-1/2) with symmetric square roots.

    Returns:
      float64 [L, T, T].
    """
    if form == "espa_2d":  # (R^1/2 (x) C^1/2)(R'^-1/2 (x) C'^-1/2) = A_row (x) A_column
        row, column = (attention_matrices((1, n), depth, at_max_depth) for n in grid)
        return np.stack([np.kron(a, b) for a, b in zip(row, column, strict=True)])
    eigenvalues, vectors = np.linalg.eigh(kernel_matrices(grid, depth, at_max_depth, form))
    root, transposed = np.sqrt(eigenvalues)[:, None], np.swapaxes(vectors, -1, -2)
    return (vectors * root @ transposed)[1:] @ (vectors / root @ transposed)[:-1]


@functools.lru_cache(maxsize=16)
def shaped_attention(
    grid: tuple[int, int], depth: int, at_max_depth: float = 0.005, form: str = "espa"
) -> tuple[np.ndarray, np.ndarray]:
    """Compute d_l and B_l with d_l * softmax(B_l) = A_l; arguments as in `attention_matrices`.

    Returns:
      `row_scale` d_l = row sums of A_l, float64 [L, T], and `attention_bias` B_l = log A_l, float64 [L, T, T], of which
      entries below `FLOOR` are raised to it. Cached; the arrays are read-only.
    """
    matrices = attention_matrices(grid, depth, at_max_depth, form)
    row_scale = matrices.sum(axis=-1)
    matrices = np.maximum(matrices, FLOOR)
    if form == "espa_reference":
        matrices = matrices / row_scale[:, None, :]  # the reference's axis; rows would be [:, :, None]
    attention_bias = np.log(matrices)
    row_scale.flags.writeable = attention_bias.flags.writeable = False
    return row_scale, attention_bias
