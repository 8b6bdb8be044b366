r"""E-SPA: attention that preserves the signal at initialization, and its relatives.

A deep stack of attention layers without skip connections drives all tokens to the same vector. The signal-preserving
attention (SPA) of He et al., "Deep Transformers without Shortcuts" (arXiv 2302.10322), avoids that: a schedule of token
kernels Sigma_0 = I, ..., Sigma_L is chosen first, and block l gets the attention matrix that turns Sigma_{l-1} into
Sigma_l. `softmax` cannot give rows that do not sum to 1, so the matrix is split in two:

    A_l = diag(row_scale_l) softmax(attention_bias_l)

which is exact at initialization, where queries are zero. Everything here is float64 NumPy and runs once.

Forms (the config's `model.attention`):
  espa            exponential kernel exp(-gamma_l |i - j|) over the raster order, symmetric square roots (the default)
  espa_causal     the same kernel with Cholesky factors: lower triangular, the paper's form for language models
  espa_2d         exponential in rows and in columns: the Kronecker product of two 1-D kernels (not in any paper)
  uspa            uniform kernel (1 - rho_l) I + rho_l 1 1^T
  espa_reference  `espa` with the bias of the PyTorch reference, which divides columns instead of rows: it does NOT give
                  A_l (off by up to 0.06 at T = 64), and is here so that reference checkpoints evaluate identically
"""

import functools

import numpy as np

FORMS = ("espa", "espa_causal", "espa_2d", "uspa", "espa_reference")

# Entries of A_l are positive in exact arithmetic but fall below float64 rounding, where they may come out negative.
# A floor of 1e-12 moves a row of 256 tokens by less than 3e-10.
FLOOR = 1e-12


def gamma_schedule(depth: int, gamma_max_depth: float) -> np.ndarray:
    """Decay rates gamma_1 .. gamma_L, falling to `gamma_max_depth` (gamma_0 is infinite: Sigma_0 = I).

    The Cholesky factor of Sigma_l has the diagonal sqrt(1 - exp(-2 gamma_l)) after its first row. The schedule lets it
    shrink by the same factor in every block, so that all blocks mix tokens equally strongly.

    Args:
      depth: Number of blocks L.
      gamma_max_depth: gamma_L > 0; small values mix more.

    Returns:
      float64 [L].
    """
    exponent = np.arange(1, depth + 1) / depth
    return -0.5 * np.log1p(-((-np.expm1(-2.0 * gamma_max_depth)) ** exponent))


def rho_schedule(depth: int, rho_max_depth: float) -> np.ndarray:
    """Correlations rho_1 .. rho_L of U-SPA, growing to `rho_max_depth` (rho_0 = 0: Sigma_0 = I).

    The kernel is that of the paper's U-SPA. The schedule follows the principle of `gamma_schedule`: far from the first
    row the Cholesky factor of Sigma_l has the diagonal sqrt(1 - rho_l), which shrinks by the same factor in each block.

    Args:
      depth: Number of blocks L.
      rho_max_depth: rho_L in (0, 1).

    Returns:
      float64 [L].
    """
    return 1.0 - (1.0 - rho_max_depth) ** (np.arange(1, depth + 1) / depth)


def exponential_kernel(num_tokens: int, gamma: float) -> np.ndarray:
    """Kernel matrix Sigma[i, j] = exp(-gamma |i - j|), float64 [T, T]."""
    position = np.arange(num_tokens)
    return np.exp(-gamma * np.abs(position[:, None] - position[None, :]))


def uniform_kernel(num_tokens: int, rho: float) -> np.ndarray:
    """Kernel matrix Sigma = (1 - rho) I + rho 1 1^T, float64 [T, T]."""
    return (1.0 - rho) * np.eye(num_tokens) + rho


def kernel_matrices(
    grid: tuple[int, int],
    depth: int,
    gamma_max_depth: float = 0.005,
    form: str = "espa",
    rho_max_depth: float = 0.8,
) -> np.ndarray:
    """Token kernels Sigma_0 .. Sigma_L that attention alone produces at initialization.

    Args:
      grid: Rows and columns of tokens; T = rows * columns, in raster order.
      depth: Number of blocks L.
      gamma_max_depth: Decay rate at the last block, for the exponential kernels.
      form: One of `FORMS`.
      rho_max_depth: Correlation at the last block, for `uspa`.

    Returns:
      float64 [L + 1, T, T], Sigma_0 = I.
    """
    rows, columns = grid
    num_tokens = rows * columns
    if form == "uspa":
        kernels = [uniform_kernel(num_tokens, rho) for rho in rho_schedule(depth, rho_max_depth)]
    elif form == "espa_2d":
        kernels = [
            np.kron(exponential_kernel(rows, gamma), exponential_kernel(columns, gamma))
            for gamma in gamma_schedule(depth, gamma_max_depth)
        ]
    else:
        kernels = [exponential_kernel(num_tokens, g) for g in gamma_schedule(depth, gamma_max_depth)]
    return np.stack([np.eye(num_tokens), *kernels])


def symmetric_sqrt(matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric square roots and their inverses of positive definite matrices, each [..., n, n]."""
    eigenvalues, vectors = np.linalg.eigh(matrices)
    root = np.sqrt(eigenvalues)[..., None, :]
    transposed = np.swapaxes(vectors, -1, -2)
    return (vectors * root) @ transposed, (vectors / root) @ transposed


def attention_matrices(
    grid: tuple[int, int],
    depth: int,
    gamma_max_depth: float = 0.005,
    form: str = "espa",
    rho_max_depth: float = 0.8,
) -> np.ndarray:
    """Attention matrices A_1 .. A_L with A_l Sigma_{l-1} A_l^T = Sigma_l.

    A_l = Sigma_l^(1/2) Sigma_{l-1}^(-1/2) with symmetric square roots; for `espa_causal`
    A_l = chol(Sigma_l) chol(Sigma_{l-1})^(-1), which is lower triangular.

    Args:
      grid: Rows and columns of tokens; T = rows * columns.
      depth: Number of blocks L.
      gamma_max_depth: Decay rate at the last block.
      form: One of `FORMS`.
      rho_max_depth: Correlation at the last block, for `uspa`.

    Returns:
      float64 [L, T, T].

    Raises:
      ValueError: If `form` is unknown.
    """
    if form not in FORMS:
        raise ValueError(f"attention form {form!r} is unknown; expected one of {', '.join(FORMS)}")
    if form == "espa_2d":  # (R^1/2 (x) C^1/2)(R'^-1/2 (x) C'^-1/2) = A_row (x) A_column
        row, column = (attention_matrices((1, n), depth, gamma_max_depth) for n in grid)
        return np.stack([np.kron(a, b) for a, b in zip(row, column, strict=True)])
    kernels = kernel_matrices(grid, depth, gamma_max_depth, form, rho_max_depth)
    if form == "espa_causal":
        factors = np.linalg.cholesky(kernels)
        # X = F_l F_{l-1}^-1 by solving F_{l-1}^T X^T = F_l^T.
        previous, current = np.swapaxes(factors[:-1], -1, -2), np.swapaxes(factors[1:], -1, -2)
        return np.tril(np.swapaxes(np.linalg.solve(previous, current), -1, -2))
    root, inverse_root = symmetric_sqrt(kernels)
    return root[1:] @ inverse_root[:-1]


@functools.lru_cache(maxsize=16)
def shaped_attention(
    grid: tuple[int, int],
    depth: int,
    gamma_max_depth: float = 0.005,
    form: str = "espa",
    rho_max_depth: float = 0.8,
) -> tuple[np.ndarray, np.ndarray]:
    """The constants d_l and B_l with d_l * softmax(B_l) = A_l. Cached; the arrays are read-only.

    Args:
      grid: Rows and columns of tokens; T = rows * columns.
      depth: Number of blocks L.
      gamma_max_depth: Decay rate at the last block.
      form: One of `FORMS`.
      rho_max_depth: Correlation at the last block, for `uspa`.

    Returns:
      `row_scale` d_l = row sums of A_l, float64 [L, T], and `attention_bias` B_l = log A_l, float64 [L, T, T], where
      entries below `FLOOR` are raised to it and those that `espa_causal` masks are -inf.

    Raises:
      ValueError: If `form` is unknown.
    """
    matrices = attention_matrices(grid, depth, gamma_max_depth, form, rho_max_depth)
    row_scale = matrices.sum(axis=-1)
    matrices = np.maximum(matrices, FLOOR)
    if form == "espa_reference":
        matrices = matrices / row_scale[:, None, :]  # the reference's axis; rows would be [:, :, None]
    attention_bias = np.log(matrices)
    if form == "espa_causal":
        attention_bias[:, ~np.tri(grid[0] * grid[1], dtype=bool)] = -np.inf
    row_scale.flags.writeable = attention_bias.flags.writeable = False
    return row_scale, attention_bias
