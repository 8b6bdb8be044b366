"""Attention rollout (Abnar and Zuidema, arXiv 2005.00928): the share of each patch in a classification.

The attention matrices of all blocks are averaged over heads and multiplied. If the model has skip connections, each is
first averaged with the identity. The head reads the mean over tokens, so the rows of the product are averaged.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplest_vit.models import ViT
from simplest_vit.models.layers import token_grid


def attention_rollout(model: ViT, image: jax.Array) -> np.ndarray:
    """Compute the share of each patch in the tokens that the head reads.

    Args:
      model: The model.
      image: Normalized images [B, H, W, C].

    Returns:
      float32 [B, rows, columns]; each sums to 1.
    """
    graphdef, state = nnx.split(model)
    grid = token_grid(image.shape[1:], model.patch_size)
    return np.asarray(_rollout(graphdef, nnx.to_pure_dict(state), image)).reshape(len(image), *grid)


@functools.partial(jax.jit, static_argnums=0)
def _rollout(graphdef: nnx.GraphDef, state: Any, image: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, state)
    blocks_def, blocks = nnx.split(model.blocks)
    x = model.embed(image)
    eye = jnp.eye(x.shape[1])[None]

    def body(carry: tuple[jax.Array, jax.Array], layer: Any) -> tuple[tuple[jax.Array, jax.Array], None]:
        x, product = carry
        block = nnx.merge(blocks_def, layer)
        # Value-SkipInit may have negative weights; their size counts.
        matrix = jnp.abs(block.attention.matrix(x).mean(axis=1))
        matrix = matrix / matrix.sum(axis=-1, keepdims=True)
        if model.has_skip:
            matrix = (matrix + eye) / 2
        return (block(x), matrix @ product), None

    start = x, jnp.broadcast_to(eye, (len(x), *eye.shape[1:]))
    (_, product), _ = jax.lax.scan(body, start, nnx.as_pure(blocks))
    return product.mean(axis=1)
