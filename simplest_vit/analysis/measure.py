"""What a model does to the signal, block by block: kernels, attention and gradients of one batch.

The models are used as they are: their stacked blocks are sliced and applied one after another.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from simplest_vit.models.layers import patchify
from simplest_vit.models.simple_vit import SimpleViT
from simplest_vit.models.simplest_vit import ShapedAttention, SimplestViT, ValueSkipInit

Model = SimplestViT | SimpleViT


def attention_weights(attention: Any, x: jax.Array) -> jax.Array:
    """The softmax of an attention layer of either model for tokens [B, T, D]: float32 [B, H, T, T]."""
    if hasattr(attention, "norm"):
        x = attention.norm(x)
    b, t, d = x.shape
    heads = attention.num_heads
    q, k = (dense(x).reshape(b, t, heads, d // heads) for dense in (attention.query, attention.key))
    logits = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) * (d // heads) ** -0.5
    if isinstance(attention, ShapedAttention):
        logits = logits + attention.attention_bias[...].reshape(1, -1, t, t)
    return jax.nn.softmax(logits, axis=-1)


def attention_matrix(attention: Any, weights: jax.Array) -> jax.Array:
    """What the layer multiplies values with: `weights` after its row scale or its skip; float32 [B, H, T, T]."""
    if isinstance(attention, ShapedAttention) and attention.row_scale is not None:
        return weights * attention.row_scale[...][None, None, :, None]
    if isinstance(attention, ValueSkipInit):
        eye = jnp.eye(weights.shape[-1])[None, None]
        return attention.alpha[...] * eye + attention.beta[...] * weights
    return weights


def embed(model: Model, image: jax.Array) -> jax.Array:
    """Tokens [B, T, D] before the first block for images [B, H, W, C]."""
    x = model.patch_embedding(patchify(image, model.patch_size))
    return x + model.position_embedding[...].astype(model.dtype)[None]


def classify(model: Model, x: jax.Array) -> jax.Array:
    """Logits, float32 [B, num_classes], for tokens [B, T, D] after the last block."""
    pooled = x.astype(jnp.float32).mean(axis=1)
    return model.head(model.norm(pooled) if isinstance(model, SimpleViT) else pooled)


def _kernel(x: jax.Array) -> jax.Array:
    """`kernel_theory.token_kernel` on the device: float32 [2, B, T, T]."""
    pairs = jnp.stack([x, jnp.roll(x, -1, axis=0)])
    return jnp.einsum("btd,pbsd->pbts", x, pairs) / x.shape[-1]


def measure(model: Model, image: jax.Array, label: jax.Array, target: np.ndarray) -> dict[str, np.ndarray]:
    """Run a batch forward and backward, and keep what each block does to it.

    Args:
      model: The model, in float32.
      image: Normalized images [B, H, W, C].
      label: Class distributions, float32 [B, num_classes], for the loss whose gradients are taken.
      target: Attention matrices A_l to compare with, [L, H, T, T], or [L, 1, T, T] where all heads are alike.

    Returns:
      NumPy arrays, with block 0 for the embedding:
        kernel: [L + 1, 2, B, T, T], see `kernel_theory`.
        attention_entropy: [L], mean entropy of the rows of the softmax, nats.
        attention_distance: [L], root mean square over images and heads of |A - A_l| / |A_l| (Frobenius).
        token_gradient: [L + 1], norm of the loss's gradient at the tokens.
        parameter_gradient: [L], norm of the loss's gradient at the parameters of the block.
        logits: [B, num_classes].
    """
    graphdef, state = nnx.split(model)
    with jax.default_matmul_precision("float32"):
        measured = _measure(graphdef, nnx.to_pure_dict(state), image, label, jnp.asarray(target, jnp.float32))
    return jax.tree.map(np.asarray, measured)


@functools.partial(jax.jit, static_argnums=0)
def _measure(
    graphdef: nnx.GraphDef, state: Any, image: jax.Array, label: jax.Array, target: jax.Array
) -> dict[str, jax.Array]:
    model = nnx.merge(graphdef, state)
    blocks_def, *parts = nnx.split(model.blocks, nnx.Param, ...)
    params, constants = (nnx.as_pure(part) for part in parts)
    x = embed(model, image)
    depth = len(target)

    def loss(params: Any, probes: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean cross-entropy; the gradient at `probes` (zeros, one for each point between blocks) is the tokens'."""

        def body(x: jax.Array, layer: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            params, constants, probe, target = layer
            block = nnx.merge(blocks_def, params, constants)
            weights = attention_weights(block.attention, x)
            difference = attention_matrix(block.attention, weights) - target[None]
            distance = jnp.mean(jnp.sum(difference**2, axis=(-2, -1))) / jnp.mean(jnp.sum(target**2, axis=(-2, -1)))
            entropy = -jnp.sum(jax.scipy.special.xlogy(weights, weights), axis=-1)
            y = block(x) + probe
            return y, {
                "kernel": _kernel(y),
                "attention_entropy": jnp.mean(entropy),
                "attention_distance": jnp.sqrt(distance),
            }

        first = x + probes[0]
        last, measured = jax.lax.scan(body, first, (params, constants, probes[1:], target))
        logits = classify(model, last)
        measured["kernel"] = jnp.concatenate([_kernel(first)[None], measured["kernel"]])
        return optax.softmax_cross_entropy(logits, label).mean(), measured | {"logits": logits}

    probes = jnp.zeros((depth + 1, *x.shape), x.dtype)
    (params_gradient, tokens_gradient), measured = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, probes)
    squares = [jnp.sum(g**2, axis=tuple(range(1, g.ndim))) for g in jax.tree.leaves(params_gradient)]
    return measured | {
        "token_gradient": jnp.sqrt(jnp.sum(tokens_gradient**2, axis=(1, 2, 3))),
        "parameter_gradient": jnp.sqrt(sum(squares)),
    }


def attention_alone(model: Model) -> np.ndarray:
    """Kernels that the attention layers give to orthogonal tokens of unit mean square, without the MLPs.

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
