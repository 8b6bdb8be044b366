"""Signal propagation in the limit of infinite width: the kernels of tokens after each block, free of noise.

A kernel is the mean product of two tokens' features. Here it is kept for two kinds of pairs, float64 [2, B, T, T]:

    kernel[0, b]  tokens of image b with one another
    kernel[1, b]  tokens of image b with those of image b + 1 (the last one's with the first)

At initialization attention maps it to the mean over heads of A_h K A_h^T: heads own disjoint columns of the values,
which keep products (He et al., arXiv 2302.10322, section 3). A shaped MLP maps that to q * C(C(corr(K))), with the
activation's C-map C (TAT, arXiv 2203.08120, section 3); a mirrored one, being orthogonal, leaves it as it is. With
several images, A_h acts on every pair of images alike.
"""

from collections.abc import Callable

import numpy as np

from simplest_vit.models import tat


def token_kernel(x: np.ndarray) -> np.ndarray:
    """Kernel of tokens [B, T, D]: [2, B, T, T]."""
    pairs = np.stack([x, np.roll(x, -1, axis=0)])
    return np.einsum("btd,pbsd->pbts", x, pairs, optimize=True) / x.shape[-1]


def embedding_kernel(patches: np.ndarray, position_embedding: np.ndarray) -> np.ndarray:
    """Expected kernel after the patch embedding, whose weights are N(0, 1 / fan_in).

    Args:
      patches: Flat patches [B, T, fan_in].
      position_embedding: [T, D].

    Returns:
      float64 [2, B, T, T].
    """
    position = np.asarray(position_embedding, np.float64)
    return token_kernel(np.asarray(patches, np.float64)) + position @ position.T / position.shape[1]


def mean_square(kernel: np.ndarray) -> np.ndarray:
    """The q-values of all tokens: [..., 2, B, T, T] -> [..., B, T]."""
    return np.diagonal(kernel[..., 0, :, :, :], axis1=-2, axis2=-1)


def norms(kernel: np.ndarray) -> np.ndarray:
    """Products of the two tokens' root mean squares, in the shape of `kernel`."""
    root = np.sqrt(mean_square(kernel))
    other = np.stack([root, np.roll(root, -1, axis=-2)], axis=-3)
    return root[..., None, :, :, None] * other[..., :, :, None, :]


def correlation(kernel: np.ndarray) -> np.ndarray:
    """Cosines of tokens, in the shape of `kernel`."""
    return kernel / norms(kernel)


def dense_gain(fan_in: int, fan_out: int, init: str) -> float:
    """Factor of the mean square through a scaled orthogonal layer: 1 for SUO; the reference swaps in and out."""
    ratio = fan_in / fan_out if init == "reference" else fan_out / fan_in
    return max(ratio, 1.0) * min(fan_in / fan_out, 1.0)


def shaped_mlp(kernel: np.ndarray, negative_slope: float, gain: float = 1.0) -> np.ndarray:
    """K -> gain * q * C(C(corr(K))), two dense layers with a leaky ReLU each.

    Args:
      kernel: float64 [2, B, T, T].
      negative_slope: Of the activation.
      gain: Factor of the mean square through the two dense layers.

    Returns:
      float64 [2, B, T, T].
    """
    return gain * norms(kernel) * tat.composed_c_map(correlation(kernel), negative_slope, 2)


def kernel_recursion(kernel: np.ndarray, attention: np.ndarray, mlp: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Kernels before the first block and after each: K -> mlp(mean over heads of A_h K A_h^T).

    Args:
      kernel: float64 [2, B, T, T], before the first block.
      attention: float64 [L, H, T, T], what attention multiplies values with at initialization; H may be 1, where all
        heads are alike.
      mlp: What an MLP makes of a kernel.

    Returns:
      float64 [L + 1, 2, B, T, T].
    """
    kernels = [kernel]
    for heads in attention:
        kernels.append(mlp(sum(matrix @ kernels[-1] @ matrix.T for matrix in heads) / len(heads)))
    return np.stack(kernels)
