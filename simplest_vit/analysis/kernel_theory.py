"""Signal propagation in the limit of infinite width: the kernels of tokens after each block, free of noise.

A kernel is the mean product of two tokens' features. Here it is kept for two kinds of pairs, float64 [2, B, T, T]:

    kernel[0, b]  tokens of image b with one another
    kernel[1, b]  tokens of image b with those of image b + 1 (the last one's with the first)

At initialization attention maps it to the mean over heads of A_h K A_h^T: heads own disjoint columns of the values,
which keep products (He et al., arXiv 2302.10322, section 3). An MLP maps that to q * C(corr(K)) and leaves the mean
squares q as they are. C is the C-map of both activations for TAT (arXiv 2203.08120, section 3), and the identity for
the looks-linear MLP, which is orthogonal. With several images, A_h acts on every pair of images alike.
"""

from collections.abc import Callable

import numpy as np


def token_kernel(x: np.ndarray) -> np.ndarray:
    """Compute the kernel of tokens [B, T, D]: [2, B, T, T]."""
    pairs = np.stack([x, np.roll(x, -1, axis=0)])
    return np.einsum("btd,pbsd->pbts", x, pairs, optimize=True) / x.shape[-1]


def embedding_kernel(patches: np.ndarray, position_embedding: np.ndarray) -> np.ndarray:
    """Compute the expected kernel after the patch embedding, whose weights are N(0, 1 / fan_in).

    Args:
      patches: Flat patches [B, T, fan_in].
      position_embedding: [T, D].

    Returns:
      float64 [2, B, T, T].
    """
    position = np.asarray(position_embedding, np.float64)
    return token_kernel(np.asarray(patches, np.float64)) + position @ position.T / position.shape[1]


def mean_square(kernel: np.ndarray) -> np.ndarray:
    """Return the q-values of all tokens: [..., 2, B, T, T] -> [..., B, T]."""
    return np.diagonal(kernel[..., 0, :, :, :], axis1=-2, axis2=-1)


def norms(kernel: np.ndarray) -> np.ndarray:
    """Return the products of the two tokens' root mean squares, in the shape of `kernel`."""
    root = np.sqrt(mean_square(kernel))
    other = np.stack([root, np.roll(root, -1, axis=-2)], axis=-3)
    return root[..., None, :, :, None] * other[..., :, :, None, :]


def correlation(kernel: np.ndarray) -> np.ndarray:
    """Return the cosines of tokens, in the shape of `kernel`."""
    return kernel / norms(kernel)


def apply_mlp(kernel: np.ndarray, c_map: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Map kernels K, float64 [2, B, T, T], to q * C(corr(K)) with the C-map of an MLP."""
    return norms(kernel) * c_map(correlation(kernel))


def kernel_recursion(
    kernel: np.ndarray, attention: np.ndarray, c_map: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Compute the kernels before the first block and after each: K -> q * C(corr(K')), K' = mean_h A_h K A_h^T.

    Args:
      kernel: float64 [2, B, T, T], before the first block.
      attention: float64 [L, H or 1, T, T], what values are multiplied with at initialization.
      c_map: Cosines before an MLP -> cosines after it.

    Returns:
      float64 [L + 1, 2, B, T, T].
    """
    kernels = [kernel]
    for heads in attention:
        kernels.append(apply_mlp(sum(matrix @ kernels[-1] @ matrix.T for matrix in heads) / len(heads), c_map))
    return np.stack(kernels)
