"""Shift attention: every head starts as a translation of the token grid, so that attention is an isometry.

Head h attends to the token at distance `offset_h`, on a grid that wraps around, and slightly to all tokens:

    A_h = (1 - eps) P_h + eps / T 1 1^T = softmax(log A_h)

P_h is a permutation and eps the `uniform_fraction`. Heads own disjoint columns of the values. At eps = 0 the output
therefore has the norm of any input: sum_h |P_h X W_h|^2 = |X W|^2 = |X|^2 for orthogonal values W = [W_1 .. W_H]. Rows
of A_h sum to 1, so no row scale is needed. With eps > 0, queries can learn to reach every token: they have to overcome
log(eps / T).

By default three of four heads stay in place and the others move by one token. After L blocks the content of a channel
has then moved by about sqrt(L / 4) tokens; if all heads moved, it could be anywhere on a small grid.

Impulse initialization (arXiv 2505.19985) starts heads this way in networks with skip connections and normalization.
"""

import jax
import jax.numpy as jnp
import numpy as np


def head_offsets(num_heads: int, grid: tuple[int, int], depth: int, identity_head_fraction: float = 0.75) -> np.ndarray:
    """Choose the offsets of the heads of each block: zero for heads that stay in place, nearby ones for the others.

    The moving heads are spread evenly over the blocks, so that a share that is not a whole number of heads holds on
    average. Over all blocks they cycle through the m nearest offsets and those tied with the last of them, where m is
    the largest number of moving heads in a block. Opposite offsets are consecutive: a single moving head attends left,
    right, up and down in four blocks; two attend left and right, then up and down.

    Args:
      num_heads: H, at most T = rows * columns.
      grid: Rows and columns of tokens.
      depth: L.
      identity_head_fraction: Share of the heads of all blocks that stay, in (0, 1]; their number is rounded up.

    Returns:
      int [L, H, 2], offsets in rows and columns; the moving heads of a block have different offsets.
    """
    num_tokens = grid[0] * grid[1]
    result = np.zeros((depth, num_heads, 2), int)
    per_block = min((1.0 - identity_head_fraction) * num_heads, num_tokens - 1)
    moving = np.diff(np.floor(per_block * np.arange(depth + 1) + 1e-6)).astype(int)
    if moving.any():
        rows, columns = (np.arange(n) - (n - 1) // 2 for n in grid)  # one representative of each offset on the torus
        offsets = [(int(y), int(x)) for y in rows for x in columns if (y, x) != (0, 0)]
        offsets.sort(key=lambda o: (o[0] ** 2 + o[1] ** 2, max(o, (-o[0], -o[1]))))
        lengths = np.square(offsets).sum(axis=1)
        near = np.asarray(offsets)[lengths <= lengths[moving.max() - 1]]
        result[np.arange(num_heads) >= num_heads - moving[:, None]] = np.resize(near, (moving.sum(), 2))
    return result


def sources(offsets: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return the token at each offset from each token: int [..., 2] -> int32 [..., T], tokens in raster order."""
    y, x = np.indices(grid).reshape(2, -1)
    dy, dx = np.moveaxis(offsets, -1, 0)[..., None]
    return ((y + dy) % grid[0] * grid[1] + (x + dx) % grid[1]).astype(np.int32)


def attention_matrices(source: np.ndarray, uniform_fraction: float) -> np.ndarray:
    """Return A_h = (1 - uniform_fraction) P_h + uniform_fraction / T 1 1^T.

    The source is int [..., T], from `sources`; the fraction is in [0, 1); the matrices are float64 [..., T, T].
    """
    num_tokens = source.shape[-1]
    return uniform_fraction / num_tokens + (1.0 - uniform_fraction) * np.eye(num_tokens)[source]


@jax.custom_vjp
def translate(heads: jax.Array, source: jax.Array) -> jax.Array:
    """Move tokens [B, T, H, d] by head: output[b, t, h] = heads[b, source[h, t], h].

    The source is a permutation of the tokens for each head, int [H, T]. The custom gradient moves them back; JAX's own
    would be a scatter.
    """
    return jnp.take_along_axis(heads, source.T[None, :, :, None], axis=1, mode="clip")


def _translate_back(source: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
    return translate(gradient, jnp.argsort(source, axis=-1)), None


translate.defvjp(lambda heads, source: (translate(heads, source), source), _translate_back)
