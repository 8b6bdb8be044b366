"""Moves leaves into stacks of blocks and back: reshapes, transposes and concatenations only."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .plan import Leaf, Piece, Plan, path_name

# Says how the blocks (layers, k1, b1, k2, b2, ...) of a piece are laid out over devices.
Constrain = Callable[[jax.Array], jax.Array]


def to_blocks(plan: Plan, leaves: Sequence[jax.Array], constrain: Constrain = lambda x: x) -> list[jax.Array]:
    """Cut leaves into blocks.

    Args:
      plan: The plan.
      leaves: One array for each leaf of the plan, of its shape.
      constrain: Applied to the blocks of each piece, (layers, k1, b1, k2, b2, ...).

    Returns:
      For each stack an array (count, *block_shape) in the plan's dtype.
    """
    found: list[list[jax.Array]] = [[] for _ in plan.stacks]  # in the order of the slots
    for leaf, value in zip(plan.leaves, leaves, strict=True):
        for piece in leaf.pieces:
            found[piece.stack].append(_cut_piece(leaf, piece, value.astype(plan.options.dtype), constrain))
    return [jnp.concatenate(blocks) for blocks in found]


def from_blocks(plan: Plan, stacks: Sequence[jax.Array], constrain: Constrain = lambda x: x) -> list[Any]:
    """Put blocks back into leaves: the inverse of `to_blocks`.

    Args:
      plan: The plan.
      stacks: For each stack an array (count, *block_shape).
      constrain: As in `to_blocks`.

    Returns:
      One array for each leaf, of its shape; None where it has no blocks.
    """
    return [_join_pieces(leaf, stacks, constrain) if leaf.pieces else None for leaf in plan.leaves]


def gradient_leaves(plan: Plan, updates: Any) -> list[jax.Array]:
    """List one gradient for each leaf of the plan.

    Args:
      plan: The plan.
      updates: The parameters' tree, where gradients may be missing (None). A missing one is infinite here, which leaves
        its statistics and moments as they are.

    Returns:
      Arrays of the leaves' shapes.

    Raises:
      ValueError: For gradients whose paths or shapes are not the parameters'.
    """
    given = dict(jax.tree_util.tree_leaves_with_path(updates))
    unknown = set(given) - {leaf.keys for leaf in plan.leaves}
    if unknown:
        raise ValueError(f"updates: {sorted(map(path_name, unknown))} are not among the parameters.")
    gradients = [
        given[leaf.keys] if leaf.keys in given else jnp.full(leaf.shape, jnp.inf, leaf.dtype) for leaf in plan.leaves
    ]
    for leaf, gradient in zip(plan.leaves, gradients, strict=True):
        if jnp.shape(gradient) != leaf.shape:
            raise ValueError(f"{leaf.path}: a gradient of shape {jnp.shape(gradient)}: it must be {leaf.shape}.")
    return [jnp.asarray(gradient) for gradient in gradients]


def as_updates(plan: Plan, leaves: Sequence[jax.Array], updates: Any) -> Any:
    """Arrange leaves in the tree and the types of `updates`, without those that are missing there."""
    by_keys = {leaf.keys: value for leaf, value in zip(plan.leaves, leaves, strict=True)}
    return jax.tree_util.tree_map_with_path(lambda keys, x: by_keys[keys].astype(jnp.result_type(x)), updates)


def _cut_piece(leaf: Leaf, piece: Piece, value: jax.Array, constrain: Constrain) -> jax.Array:
    """(layers, k1 b1, k2 b2, ...) -> (layers k1 k2 ..., b1, b2, ...)."""
    order = len(piece.counts)
    value = value.reshape(leaf.num_layers, *leaf.merged_shape)
    ends = (s + k * b for s, k, b in zip(piece.starts, piece.counts, piece.block_shape, strict=True))
    region = tuple(slice(s, e) for s, e in zip(piece.starts, ends, strict=True))
    pairs = (n for pair in zip(piece.counts, piece.block_shape, strict=True) for n in pair)
    value = constrain(value[(slice(None), *region)].reshape(leaf.num_layers, *pairs))
    counts_first = (0, *range(1, 2 * order, 2), *range(2, 2 * order + 1, 2))
    return value.transpose(counts_first).reshape(piece.num_blocks, *piece.block_shape)


def _join_pieces(leaf: Leaf, stacks: Sequence[jax.Array], constrain: Constrain) -> jax.Array:
    order = len(leaf.merged_shape)
    regions = []
    for piece in leaf.pieces:
        value = stacks[piece.stack][piece.slot : piece.slot + piece.num_blocks]
        value = value.reshape(leaf.num_layers, *piece.counts, *piece.block_shape)
        interleaved = (0, *(axis for i in range(1, order + 1) for axis in (i, order + i)))
        sizes = (k * b for k, b in zip(piece.counts, piece.block_shape, strict=True))
        regions.append((piece.starts, constrain(value.transpose(interleaved)).reshape(leaf.num_layers, *sizes)))
    # Regions are in row-major order: join those that differ in the last axis alone, and so on up.
    for axis in reversed(range(order)):
        rows: dict[tuple[int, ...], list[jax.Array]] = {}
        for starts, value in regions:
            rows.setdefault(starts[:axis], []).append(value)
        regions = [(starts, jnp.concatenate(values, axis + 1)) for starts, values in rows.items()]
    return regions[0][1].reshape(leaf.shape)
