"""Shift attention: every head starts as a translation of the token grid, so that attention is an isometry.

Head h looks at the token that lies `offset_h` away, on a grid whose opposite borders meet, and a little at all of them:

    A_h = (1 - eps) P_h + eps / T 1 1^T = softmax(log A_h)

P_h is a permutation. Heads own disjoint columns of the values: at eps = 0 the output has the norm of the input,
whatever the input is, sum_h |P_h X W_h|^2 = |X W|^2 = |X|^2 for orthogonal values W = [W_1 .. W_H]. Rows of A_h sum to
1, so that no row scale is needed. `eps` keeps every token in reach of learning: log(eps / T) is what a query has to
overcome.

Half of the heads stay in place: what a channel holds has then moved by sqrt(L / 2) tokens behind L blocks, where it
would be anywhere on a small grid if all heads moved.

Impulse initialization (arXiv 2505.19985) starts heads alike, in networks with skip connections and normalization.
"""

import numpy as np


def head_offsets(num_heads: int, grid: tuple[int, int], depth: int) -> np.ndarray:
    """Offsets of the heads of each block: half of them none, the others the nearest ones.

    Of the nearest offsets as many are taken as are equally far, each beside its opposite, and the heads of the blocks
    have them in turn: one head that moves looks left, right, up and down in four blocks.

    Args:
      num_heads: H, at most T = rows * columns; of an odd number one more head stays than moves.
      grid: Rows and columns of tokens.
      depth: L.

    Returns:
      int [L, H, 2], rows and columns to look away; those of the heads that move are different within a block.

    Raises:
      ValueError: If there are more heads than tokens.
    """
    num_tokens = grid[0] * grid[1]
    if num_heads > num_tokens:
        raise ValueError(f"num_heads={num_heads} must be at most the number of tokens, {grid[0]} x {grid[1]}")
    rows, columns = (np.arange(n) - (n - 1) // 2 for n in grid)  # one representative of each offset on the torus
    offsets = [(int(y), int(x)) for y in rows for x in columns if (y, x) != (0, 0)]
    offsets.sort(key=lambda o: (o[0] ** 2 + o[1] ** 2, max(o, (-o[0], -o[1])), o))
    moving = num_heads // 2
    result = np.zeros((depth, num_heads, 2), int)
    if moving:
        lengths = np.square(offsets).sum(axis=1)
        near = np.asarray(offsets)[lengths <= lengths[moving - 1]]
        turns = np.arange(depth)[:, None] * moving + np.arange(moving)
        result[:, num_heads - moving :] = near[turns % len(near)]
    return result


def attention_matrices(num_heads: int, grid: tuple[int, int], eps: float, depth: int) -> np.ndarray:
    """Attention matrices A_h = (1 - eps) P_h + eps / T 1 1^T of each block.

    Args:
      num_heads: H, at most T.
      grid: Rows and columns of tokens; T = rows * columns, in raster order.
      eps: Share of uniform attention, in [0, 1).
      depth: L.

    Returns:
      float64 [L, H, T, T].

    Raises:
      ValueError: If there are more heads than tokens.
    """
    num_tokens = grid[0] * grid[1]
    offsets, which = np.unique(head_offsets(num_heads, grid, depth).reshape(-1, 2), axis=0, return_inverse=True)
    index = np.arange(num_tokens).reshape(grid)
    matrices = np.full((len(offsets), num_tokens, num_tokens), eps / num_tokens)
    for matrix, offset in zip(matrices, offsets, strict=True):
        target = np.roll(index, tuple(-offset), axis=(0, 1))
        matrix[index.ravel(), target.ravel()] += 1.0 - eps
    return matrices[which.reshape(depth, num_heads)]


def attention_bias(num_heads: int, grid: tuple[int, int], eps: float, depth: int) -> np.ndarray:
    """The constant B_h = log A_h with softmax(B_h) = A_h; arguments and errors as in `attention_matrices`.

    Returns:
      float64 [L, H, T, T]; -inf off the permutation where `eps` is 0, which no query can overcome.
    """
    with np.errstate(divide="ignore"):
        return np.log(attention_matrices(num_heads, grid, eps, depth))
