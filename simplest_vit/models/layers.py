"""What both models are made of: patches, positions, attention, and depth as a scan."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from simplest_vit.models import attention

# Stacks of up to so many layers are unrolled by `scan`. A loop copies what the backward pass needs into arrays of all
# layers and out again, and fills these with zeros first: 9 % of a step of S/4 at batch 64 on a CPU.
_MAX_UNROLLED = 12


class Constant(nnx.Variable):
    """An array of the model that is not trained: never decayed, preconditioned or averaged."""


def sincos_position_embedding(grid: tuple[int, int], width: int) -> np.ndarray:
    """Fixed 2-D position embedding of SimpleViT (arXiv 2205.01580), [sin x, cos x, sin y, cos y].

    Args:
      grid: Rows and columns of patches; T = rows * columns, in raster order.
      width: Model width D, a multiple of 4 and at least 8.

    Returns:
      float32 [T, D], frequencies omega_k = 10000^(-k / (D/4 - 1)).
    """
    y, x = np.mgrid[: grid[0], : grid[1]]
    omega = 10_000.0 ** -(np.arange(width // 4) / (width // 4 - 1))
    y, x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1).astype(np.float32)


def token_grid(image_shape: Sequence[int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of the patches of an image [H, W, C]; T = rows * columns."""
    return image_shape[0] // patch_size, image_shape[1] // patch_size


def patchify(image: jax.Array, patch_size: int) -> jax.Array:
    """Cut images [B, H, W, C] into flat patches [B, T, P * P * C], patches and pixels in raster order."""
    b, _, _, c = image.shape
    rows, columns = token_grid(image.shape[1:], patch_size)
    x = image.reshape(b, rows, patch_size, columns, patch_size, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * columns, patch_size * patch_size * c)


def rows(x: jax.Array) -> jax.Array:
    """Tokens [B, T, D] as the rows of one matrix [B * T, D], for the layers that act on each token alone.

    The gradient of their kernels is then one plain product. Summed over batch and tokens, XLA transposes its operands
    first: 66 ms instead of 17 ms for an MLP kernel of S/4 at batch 64 on a CPU.
    """
    return x.reshape(-1, x.shape[-1])


def project(x: jax.Array, *dense: nnx.Linear) -> list[jax.Array]:
    """Apply linear layers D -> D to tokens [B, T, D], which they share as rows."""
    tokens = rows(x)
    return [layer(tokens).reshape(x.shape) for layer in dense]


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU x Phi(x) (arXiv 1606.08415) by the error function, as PyTorch computes it.

    `jax.nn.gelu` takes the complementary one, which a CPU needs thrice the time for. Both are within 2e-7 |x|.
    """
    z = x.astype(jnp.float32)
    return (0.5 * z * (1 + jax.lax.erf(z * 0.5**0.5))).astype(x.dtype)


def activate(x: jax.Array, dense: nnx.Linear, activation: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Apply `activation(dense(x))` to rows [N, D], of which only the product is kept for the backward pass.

    Exact GELU would keep its input and the distribution function of it as well: of the step of S/4 at batch 2048, as
    compiled for an H200, 4.4 GB and 2.2 ms.

    Returns:
      [N, M] in the compute dtype of `dense`, which has a bias.
    """
    assert dense.bias is not None
    product = x.astype(dense.dtype) @ dense.kernel[...].astype(dense.dtype)
    bias = dense.bias[...].astype(dense.dtype)[None]
    return jax.checkpoint(lambda product, bias: activation(product + bias))(product, bias)


Joined = tuple[jax.Array, jax.Array | None]


def join_projections(attention: Any) -> Joined:
    """Kernels of queries, keys and values side by side, and their biases, for one product and one kernel.

    From a stack at once: by layer, this and the gradient's way back were 55 more launches in a step of 12 blocks.

    Args:
      attention: Has linear layers D -> D `query`, `key` and `value`, stacked or not.

    Returns:
      [..., D, 3 D], and [..., 3 D] or None.
    """
    parts = attention.query, attention.key, attention.value
    biases = [layer.bias[...] for layer in parts if layer.bias is not None]
    kernel = jnp.concatenate([layer.kernel[...] for layer in parts], axis=-1)
    return kernel, jnp.concatenate(biases, axis=-1) if biases else None


def project_and_attend(
    x: jax.Array,
    query: nnx.Linear,
    key: nnx.Linear,
    value: nnx.Linear,
    joined: Joined | None,
    num_heads: int,
    attention_bias: jax.Array | None = None,
    row_scale: jax.Array | None = None,
) -> jax.Array:
    """Self-attention of tokens [B, T, D] by linear layers D -> D; the rest as in `attend`.

    Args:
      x: [B, T, D].
      query: Makes the queries.
      key: Makes the keys.
      value: Makes the values.
      joined: The three as from `join_projections`, for one kernel after one product (`attention.fused`); None for
        `attend`.
      num_heads: H.
      attention_bias: See `attend`.
      row_scale: See `attend`.

    Returns:
      [B, T, D] in the compute dtype of the layers.
    """
    if joined is None:
        q, k, v = project(x, query, key, value)
        return attend(q, k, v, num_heads, attention_bias, row_scale)
    kernel, bias = joined
    qkv = (rows(x).astype(value.dtype) @ kernel.astype(value.dtype)).reshape(*x.shape[:2], -1)
    return attention.fused(qkv, bias, num_heads, attention_bias, row_scale)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    num_heads: int,
    attention_bias: jax.Array | None = None,
    row_scale: jax.Array | None = None,
) -> jax.Array:
    """Multi-head attention row_scale * softmax(q k^T / sqrt(d_head) + attention_bias) v.

    Logits and softmax are float32 whatever the dtype of the tokens. What the backward pass keeps of the size
    [B, H, T, T], and its products, are in the dtype of the tokens.

    Args:
      query: [B, T, D]; `key` and `value` alike.
      key: See `query`.
      value: See `query`.
      num_heads: H, a divisor of D.
      attention_bias: Constant float32 [T, T], the same for all heads, or [H, T, T], or None. It gets no gradient.
      row_scale: Constant float32 [T], or None. It gets no gradient.

    Returns:
      [B, T, D] in the dtype of `value`.
    """
    # Heads before tokens: the products then need no further transposes, forward or backward.
    q, k, v = (x.reshape(*x.shape[:2], num_heads, -1).swapaxes(1, 2) for x in (query, key, value))
    return _attend_heads(q, k, v, attention_bias, row_scale).swapaxes(1, 2).reshape(value.shape)


@jax.custom_vjp
def _attend_heads(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, row_scale: jax.Array | None
) -> jax.Array:
    """`attend` for tokens by head, [B, H, T, d_head]."""
    return _forward(q, k, v, bias, row_scale)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, row_scale: jax.Array | None
) -> tuple[jax.Array, Any]:
    tokens, d_head = q.shape[-2:]
    logits = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32) * d_head**-0.5
    if bias is not None:
        logits = logits + bias.reshape(1, -1, tokens, tokens)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("bhts,bhsd->bhtd", weights, v, preferred_element_type=jnp.float32)
    return _scaled(mixed, row_scale).astype(v.dtype), (q, k, v, weights, row_scale)


def _backward(kept: Any, gradient: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, weights, row_scale = kept
    gradient = _scaled(gradient, row_scale).astype(v.dtype)
    dv = jnp.einsum("bhts,bhtd->bhsd", weights, gradient)
    dweights = jnp.einsum("bhtd,bhsd->bhts", gradient, v).astype(jnp.float32)
    probabilities = weights.astype(jnp.float32)
    mean = jnp.sum(probabilities * dweights, axis=-1, keepdims=True)
    dlogits = (probabilities * (dweights - mean) * q.shape[-1] ** -0.5).astype(v.dtype)
    dq, dk = jnp.einsum("bhts,bhsd->bhtd", dlogits, k), jnp.einsum("bhts,bhtd->bhsd", dlogits, q)
    return dq, dk, dv, None, None


_attend_heads.defvjp(_forward, _backward)


def _scaled(x: jax.Array, row_scale: jax.Array | None) -> jax.Array:
    """Scale tokens by head: after the product with the weights, which have T / d_head times as many numbers."""
    return x if row_scale is None else x * row_scale[None, None, :, None]


def stack(create: Callable[..., Any], depth: int, rngs: nnx.Rngs, *per_layer: np.ndarray) -> Any:
    """Create `depth` blocks as one module whose arrays have a leading layer axis.

    Args:
      create: Makes a block from `rngs` and one slice of each array of `per_layer`.
      depth: Number of blocks L.
      rngs: Split into one stream for each block.
      *per_layer: Arrays [L, ...], sliced along the layers.

    Returns:
      The stacked module; apply it with `scan`.
    """

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=(0, *(0 for _ in per_layer)), out_axes=0)
    def create_stacked(rngs: nnx.Rngs, *slices: jax.Array) -> Any:
        return create(rngs, *slices)

    return create_stacked(rngs, *(jnp.asarray(array, jnp.float32) for array in per_layer))


@jax.custom_vjp
def gather(params: Any) -> Any:
    """Parameters as every device needs them to compute with: whole, where the mesh in context shares them out.

    Left to itself, XLA would move activations to some kernels instead. Gradients are left to it: they are summed into
    the shares.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return params
    return jax.lax.with_sharding_constraint(params, PartitionSpec())


gather.defvjp(lambda params: (gather(params), None), lambda _, gradient: (gradient,))


def scan(blocks: Any, x: jax.Array, *per_layer: Any, remat: bool = False) -> jax.Array:
    """Apply stacked blocks one after another: one traced block, whatever the depth, and a loop from depth 13 on.

    Args:
      blocks: A module from `stack`.
      x: Tokens [B, T, D].
      *per_layer: Further arguments of the blocks, trees of arrays [L, ...] of which each gets its slices.
      remat: Recompute each block in the backward pass: memory for one block instead of all, for a third more FLOPs.

    Returns:
      Tokens [B, T, D].
    """
    graphdef, state = nnx.split(blocks)
    layers = nnx.as_pure(state), per_layer
    depth = jax.tree.leaves(layers)[0].shape[0]

    def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        block, arguments = gather(layer)
        return nnx.merge(graphdef, block)(x, *arguments), None

    return jax.lax.scan(jax.checkpoint(body) if remat else body, x, layers, unroll=depth <= _MAX_UNROLLED)[0]
