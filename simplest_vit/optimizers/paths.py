"""Functions that distinguish parameters by their paths in the tree.

Their shapes do not suffice: with stacked blocks a bias is [L, D], which looks like a matrix.
"""

from typing import Any

import jax
import optax.contrib


def path_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Return the names along a key path, such as ('blocks', 'mlp', 'dense1', 'kernel')."""
    return tuple(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))


def is_stacked(path: tuple[Any, ...]) -> bool:
    """Return whether the leading axis of the parameter runs over the blocks."""
    return path_names(path)[0] == "blocks"


def is_kernel(path: tuple[Any, ...]) -> bool:
    """Return whether the parameter is a matrix of a linear layer: neither a bias, nor of a LayerNorm, nor a gain."""
    return path_names(path)[-1] == "kernel"


def decay_mask(params: optax.Params) -> Any:
    """Return True for parameters that weight decay applies to: kernels, not biases, not LayerNorm."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_kernel(path), params)


def stack_axes(params: optax.Params) -> Any:
    """Return the number of leading axes that enumerate blocks: 1 for stacked parameters, else 0."""
    return jax.tree_util.tree_map_with_path(lambda path, _: int(is_stacked(path)), params)


def muon_dimension_numbers(params: optax.Params) -> Any:
    """Choose Muon for the kernels of the blocks, and None (Adam) for embedding, head, biases and LayerNorm."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: optax.contrib.MuonDimensionNumbers(-2, -1) if is_stacked(path) and is_kernel(path) else None,
        params,
    )
