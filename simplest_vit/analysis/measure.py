"""Measurements of the signal in a model, block by block: kernels, attention and gradients of one batch.

The stacked blocks of the model are sliced and applied one after another.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from simplest_vit.models import ViT


def _kernel(x: jax.Array) -> jax.Array:
    """Compute `kernel_theory.token_kernel` on the device: float32 [2, B, T, T]."""
    pairs = jnp.stack([x, jnp.roll(x, -1, axis=0)])
    return jnp.einsum("btd,pbsd->pbts", x, pairs) / x.shape[-1]


def measure_propagation(
    model: ViT, image: jax.Array, label: jax.Array, start: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Run a batch forward and backward, and measure it at each block.

    Args:
      model: The model, in float32.
      image: Normalized images [B, H, W, C].
      label: Class distributions, float32 [B, num_classes], for the loss whose gradients are taken.
      start: Attention matrices at initialization, [L, H or 1, T, T], or None if they depend on the weights drawn.

    Returns:
      NumPy arrays, with block 0 for the embedding:
        kernel: [L + 1, 2, B, T, T], see `kernel_theory`.
        attention_entropy: [L], mean entropy in nats of the rows |A| / sum |A| of the attention matrices A.
        attention_distance: [L], root mean square over images and heads of |A - A_start| / |A_start| (Frobenius); absent
          without `start`.
        token_gradient: [L + 1], norm of the loss's gradient at the tokens.
        parameter_gradient: [L], norm of the loss's gradient at the parameters of the block.
        logits: [B, num_classes].
    """
    graphdef, state = nnx.split(model)
    with jax.default_matmul_precision("float32"):
        matrices = None if start is None else jnp.asarray(start, jnp.float32)
        measured = _measure(graphdef, nnx.to_pure_dict(state), image, label, matrices)
    return jax.tree.map(np.asarray, measured)


@functools.partial(jax.jit, static_argnums=0)
def _measure(
    graphdef: nnx.GraphDef, state: Any, image: jax.Array, label: jax.Array, start: jax.Array | None
) -> dict[str, jax.Array]:
    model = nnx.merge(graphdef, state)
    blocks_def, *parts = nnx.split(model.blocks, nnx.Param, ...)
    params, constants = (nnx.as_pure(part) for part in parts)
    x = model.embed(image)

    def loss(params: Any, probes: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Compute the mean cross-entropy; the gradient at `probes` (zeros between blocks) is that at the tokens."""

        def body(x: jax.Array, layer: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            params, constants, probe, start = layer
            block = nnx.merge(blocks_def, params, constants)
            matrix = block.attention.matrix(x)
            share = jnp.abs(matrix) / jnp.sum(jnp.abs(matrix), axis=-1, keepdims=True)
            y = block(x) + probe
            measured = {
                "kernel": _kernel(y),
                "attention_entropy": -jnp.mean(jnp.sum(jax.scipy.special.xlogy(share, share), axis=-1)),
            }
            if start is not None:
                squares = jnp.sum((matrix - start[None]) ** 2, axis=(-2, -1))
                measured["attention_distance"] = jnp.sqrt(
                    jnp.mean(squares) / jnp.mean(jnp.sum(start**2, axis=(-2, -1)))
                )
            return y, measured

        first = x + probes[0]
        last, measured = jax.lax.scan(body, first, (params, constants, probes[1:], start))
        logits = model.head(model.pool(last))
        measured["kernel"] = jnp.concatenate([_kernel(first)[None], measured["kernel"]])
        return optax.softmax_cross_entropy(logits, label).mean(), measured | {"logits": logits}

    probes = jnp.zeros((model.depth + 1, *x.shape), x.dtype)
    (params_gradient, tokens_gradient), measured = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, probes)
    squares = [jnp.sum(g**2, axis=tuple(range(1, g.ndim))) for g in jax.tree.leaves(params_gradient)]
    return measured | {
        "token_gradient": jnp.sqrt(jnp.sum(tokens_gradient**2, axis=(1, 2, 3))),
        "parameter_gradient": jnp.sqrt(sum(squares)),
    }


def attention_alone(model: ViT) -> np.ndarray:
    """Compute the kernels that attention gives to orthogonal tokens of unit mean square, without the MLPs.

    Args:
      model: The model, in float32; no more tokens than `width`.

    Returns:
      float64 [L, T, T]: after each block.
    """
    num_tokens, width = model.position_embedding.shape
    graphdef, state = nnx.split(model.blocks.attention)

    @jax.jit
    def kernels(state: Any) -> jax.Array:
        def body(x: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
            y = nnx.merge(graphdef, layer)(x)
            return y, _kernel(y)[0, 0]

        return jax.lax.scan(body, width**0.5 * jnp.eye(num_tokens, width)[None], state)[1]

    with jax.default_matmul_precision("float32"):
        return np.asarray(kernels(nnx.as_pure(state)), np.float64)
