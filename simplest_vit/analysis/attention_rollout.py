"""Which patches the classification rests on, by attention rollout (Abnar and Zuidema, arXiv 2005.00928).

The attention matrices of all blocks are averaged over heads and multiplied; where the model has skip connections, each
is first averaged with the identity. The head reads the mean over tokens, so the rows of the product are averaged.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplest_vit.analysis import measure
from simplest_vit.models.layers import token_grid
from simplest_vit.models.simple_vit import SimpleViT


def attention_rollout(model: measure.Model, image: jax.Array) -> np.ndarray:
    """Share of each patch in what the head reads.

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
    x = measure.embed(model, image)
    eye = jnp.eye(x.shape[1])[None]

    def body(carry: tuple[jax.Array, jax.Array], layer: Any) -> tuple[tuple[jax.Array, jax.Array], None]:
        x, product = carry
        block = nnx.merge(blocks_def, layer)
        weights = measure.attention_weights(block.attention, x)
        # Value-SkipInit may weigh negatively; what counts is how much.
        matrix = jnp.abs(measure.attention_matrix(block.attention, weights).mean(axis=1))
        matrix = matrix / matrix.sum(axis=-1, keepdims=True)
        if isinstance(model, SimpleViT):
            matrix = (matrix + eye) / 2
        return (block(x), matrix @ product), None

    start = x, jnp.broadcast_to(eye, (len(x), *eye.shape[1:]))
    (_, product), _ = jax.lax.scan(body, start, nnx.as_pure(blocks))
    return product.mean(axis=1)
