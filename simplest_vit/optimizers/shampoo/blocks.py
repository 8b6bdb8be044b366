"""Functions that move parameters into stacks of blocks and back: paddings, reshapes, transposes and concatenations.

A kernel (12, 400, 300) of 12 layers, in blocks of at most 200:

    (12, 400, 300) -> (12, 2, 200, 2, 150) -> (12, 2, 2, 200, 150) -> 48 slots of (N, 200, 150)
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from .plan import Blocks, ParamPlan, Plan
from .sharding import split_blocks


def to_blocks(plan: Plan, leaves: Sequence[jax.Array], mesh: Mesh | None = None) -> list[jax.Array]:
    """Cut leaves, one for each parameter, into an array (count, *block_shape) of the plan's dtype for each stack."""
    found: list[list[jax.Array]] = [[] for _ in plan.stacks]  # in the order of the slots
    for param, value in zip(plan.params, leaves, strict=True):
        if param.blocks:
            found[param.blocks.stack].append(_cut(param, param.blocks, value.astype(plan.options.dtype), mesh))
    return [jnp.concatenate(blocks) for blocks in found]


def from_blocks(plan: Plan, stacks: Sequence[jax.Array], mesh: Mesh | None = None) -> list[Any]:
    """Put blocks back into leaves, the inverse of `to_blocks`; a parameter without blocks gets None."""
    return [_join(param, param.blocks, stacks, mesh) if param.blocks else None for param in plan.params]


def gradient_leaves(plan: Plan, updates: Any, params: Any) -> list[jax.Array]:
    """List one gradient for each parameter of the plan, by its position in the tree `params`.

    A missing gradient (None) becomes infinite, which leaves its statistics and moments as they are.

    Raises:
      ValueError: If the gradients' tree or shapes differ from the parameters'.
    """
    try:
        given = _flatten_up_to(params, updates)
    except (ValueError, TypeError) as error:
        raise ValueError(f"updates: their tree is not the parameters'; {error}") from error
    gradients = []
    for param, gradient in zip(plan.params, given, strict=True):
        if gradient is None:
            gradient = jnp.full(param.shape, jnp.inf, param.dtype)
        if jnp.shape(gradient) != param.shape:
            raise ValueError(f"{param.path}: a gradient of shape {jnp.shape(gradient)}: it must be {param.shape}.")
        gradients.append(jnp.asarray(gradient))
    return gradients


def as_updates(leaves: Sequence[jax.Array], updates: Any, params: Any) -> Any:
    """Arrange leaves in the tree and the types of `updates`, without those that are missing there."""
    given = _flatten_up_to(params, updates)
    typed = [None if g is None else x.astype(jnp.result_type(g)) for x, g in zip(leaves, given, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), typed)


def _flatten_up_to(params: Any, updates: Any) -> list[Any]:
    tree: Any = jax.tree.structure(params)
    return tree.flatten_up_to(updates)


def _cut(param: ParamPlan, blocks: Blocks, value: jax.Array, mesh: Mesh | None) -> jax.Array:
    """(layers, up to k1 b1, up to k2 b2, ...) -> (layers k1 k2 ..., b1, b2, ...)."""
    order, pairs = len(blocks.counts), list(zip(blocks.counts, blocks.block_shape, strict=True))
    missing = [k * b - size for (k, b), size in zip(pairs, param.merged_shape, strict=True)]
    value = value.reshape(param.num_layers, *param.merged_shape)
    if any(missing):
        value = jnp.pad(value, [(0, 0), *((0, n) for n in missing)])
    value = split_blocks(value.reshape(param.num_layers, *(n for pair in pairs for n in pair)), mesh)
    counts_first = (0, *range(1, 2 * order, 2), *range(2, 2 * order + 1, 2))
    return value.transpose(counts_first).reshape(blocks.num_blocks, *blocks.block_shape)


def _join(param: ParamPlan, blocks: Blocks, stacks: Sequence[jax.Array], mesh: Mesh | None) -> jax.Array:
    order = len(blocks.counts)
    value = stacks[blocks.stack][blocks.slot : blocks.slot + blocks.num_blocks]
    value = value.reshape(param.num_layers, *blocks.counts, *blocks.block_shape)
    interleaved = (0, *(axis for i in range(1, order + 1) for axis in (i, order + i)))
    sizes = (k * b for k, b in zip(blocks.counts, blocks.block_shape, strict=True))
    value = split_blocks(value.transpose(interleaved), mesh).reshape(param.num_layers, *sizes)
    return value[(slice(None), *map(slice, param.merged_shape))].reshape(param.shape)
