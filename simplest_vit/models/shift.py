"""Shift attention: every head starts as a translation of the token grid, so that attention is an isometry.

Head h looks at the token that lies `offset_h` away, on a grid whose opposite borders meet, and a little at all of them:

    A_h = (1 - eps) P_h + eps / T 1 1^T = softmax(log A_h)

P_h is a permutation. Heads own disjoint columns of the values: at eps = 0 the output has the norm of the input,
whatever the input is, sum_h |P_h X W_h|^2 = |X W|^2 = |X|^2 for orthogonal values W = [W_1 .. W_H]. Rows of A_h sum to
1, so that no row scale is needed. `eps` keeps every token in reach of learning: log(eps / T) is what a query has to
overcome.

Most heads stay in place and the others move by a token, three of four by default: what a channel holds is then some
sqrt(L / 4) tokens from where it was after L blocks, and would be anywhere on a small grid if all heads moved.

Impulse initialization (arXiv 2505.19985) starts heads alike, in networks with skip connections and normalization.
"""

import numpy as np


def head_offsets(num_heads: int, grid: tuple[int, int], depth: int, in_place: float = 0.75) -> np.ndarray:
    """Offsets of the heads of each block: none for those that stay in place, near ones for the others.

    The heads of all blocks that move are spread evenly over the blocks; so a share that is not a whole number of heads
    is kept over some blocks. The m nearest offsets, for the m heads of the block where most move, and all that are as
    near as the last of these, are taken in turn by one head after the other, through all blocks. Opposite ones follow
    each other: one head that moves looks left, right, up and down in four blocks, two left and right, then up and down.

    Args:
      num_heads: H, at most T = rows * columns.
      grid: Rows and columns of tokens.
      depth: L.
      in_place: Share of the heads of all blocks that stay, in (0, 1]; rounded up to whole ones.

    Returns:
      int [L, H, 2], rows and columns to look away; those of the heads that move are different within a block.

    Raises:
      ValueError: If there are more heads than tokens.
    """
    num_tokens = grid[0] * grid[1]
    if num_heads > num_tokens:
        raise ValueError(f"num_heads={num_heads} must be at most the number of tokens, {grid[0]} x {grid[1]}")
    result = np.zeros((depth, num_heads, 2), int)
    per_block = min((1.0 - in_place) * num_heads, num_tokens - 1)
    moving = np.diff(np.floor(per_block * np.arange(depth + 1) + 1e-6)).astype(int)
    if moving.any():
        rows, columns = (np.arange(n) - (n - 1) // 2 for n in grid)  # one representative of each offset on the torus
        offsets = [(int(y), int(x)) for y in rows for x in columns if (y, x) != (0, 0)]
        offsets.sort(key=lambda o: (o[0] ** 2 + o[1] ** 2, max(o, (-o[0], -o[1]))))
        lengths = np.square(offsets).sum(axis=1)
        near = np.asarray(offsets)[lengths <= lengths[moving.max() - 1]]
        result[np.arange(num_heads) >= num_heads - moving[:, None]] = np.resize(near, (moving.sum(), 2))
    return result


def attention_matrices(offsets: np.ndarray, grid: tuple[int, int], eps: float) -> np.ndarray:
    """Attention matrices A_h = (1 - eps) P_h + eps / T 1 1^T.

    Args:
      offsets: int [..., 2], rows and columns to look away.
      grid: Rows and columns of tokens; T = rows * columns, in raster order.
      eps: Share of uniform attention, in [0, 1).

    Returns:
      float64 [..., T, T].
    """
    y, x = np.indices(grid).reshape(2, -1)
    dy, dx = np.moveaxis(offsets, -1, 0)[..., None]
    target = (y + dy) % grid[0] * grid[1] + (x + dx) % grid[1]
    return eps / y.size + (1.0 - eps) * np.eye(y.size)[target]


def attention_bias(offsets: np.ndarray, grid: tuple[int, int], eps: float) -> np.ndarray:
    """The constant B_h = log A_h with softmax(B_h) = A_h; arguments as in `attention_matrices`.

    Returns:
      float64 [..., T, T]; -inf off the permutation where `eps` is 0, which no query can overcome.
    """
    with np.errstate(divide="ignore"):
        return np.log(attention_matrices(offsets, grid, eps))
