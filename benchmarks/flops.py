"""Count what a model computes, from the shapes of its parameters."""

import math
from typing import Any

import jax

from simplest_vit.models.layers import token_grid
from simplest_vit.optimizers import paths
from simplest_vit.training.run import Run


def forward_flops(params: Any, tokens: int) -> float:
    """Count floating-point operations for one image: products with kernels, and attention.

    Args:
      params: The model's parameters, or their shapes.
      tokens: T; the head sees one token, everything else all of them.

    Returns:
      Twice the multiplications.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    products = sum(
        2 * x.size * (1 if paths.path_names(path)[0] == "head" else tokens)
        for path, x in leaves
        if paths.is_kernel(path)
    )
    attention = params["blocks"].get("attention", {})
    if "query" not in attention:  # constant shifts only move tokens
        return products
    depth, width, _ = attention["query"]["kernel"].shape
    return products + depth * 4 * tokens**2 * width


def step_flops(run: Run) -> float:
    """Count the FLOPs of the products of a step: backward takes twice as many as forward."""
    tokens = math.prod(token_grid(run.data.image_shape, run.config.model.patch_size))
    return 3 * forward_flops(run.abstract.params, tokens) * run.config.batch_size
