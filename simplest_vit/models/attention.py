"""Multi-head attention: one class and one formula for all kinds of attention in `attention_kinds`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import zeros

from simplest_vit.models import fused_attention, initializers, layers
from simplest_vit.models.attention_kinds import Attend, AttentionKind

# Kernels [..., D, 3 D] and biases [..., 3 D] (or None) of queries, keys and values, side by side.
QKV = tuple[jax.Array, jax.Array | None]


class Attention(nnx.Module):
    """Self-attention of one kind, with or without normalization and output projection."""

    def __init__(
        self,
        kind: AttentionKind,
        constants: dict[str, jax.Array],
        width: int,
        num_heads: int,
        *,
        init: initializers.Init,
        norm: str,
        output_projection: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """Initialize parameters (float32).

        Args:
          constants: From `kind.constants`, of this block.
          width: D.
          num_heads: H, a divisor of D.
          norm: One of `layers.NORMS`.
          output_projection: Whether a kernel [D, D] mixes the heads; if so, no projection has a bias, as in SimpleViT.
        """
        kernels = {"query": init.keys, "key": init.keys, "value": init.linear, "out": init.linear}
        if init.attention:
            drawn = init.attention(rngs.params(), width, num_heads)
            kernels = {name: lambda *_, kernel=kernel: kernel for name, kernel in drawn.items()}
        if kind.zero_queries:
            kernels["query"] = zeros

        def dense(name: str) -> nnx.Linear:
            return nnx.Linear(
                width,
                width,
                use_bias=not output_projection,
                kernel_init=kernels[name],
                bias_init=init.bias(width),
                dtype=dtype,
                rngs=rngs,
            )

        self.norm = layers.create_norm(norm, width, dtype=dtype, rngs=rngs)
        if kind.has_queries:
            self.query = dense("query")
            self.key = dense("key")
        if kind.has_values:
            self.value = dense("value")
        self.out = dense("out") if output_projection else None
        arrays: dict[str, nnx.Variable] = {name: layers.Constant(array) for name, array in constants.items()}
        arrays |= {name: nnx.Param(jnp.asarray(value, jnp.float32)) for name, value in kind.parameters.items()}
        for name, array in arrays.items():
            setattr(self, name, array)
        self.array_names = tuple(arrays)
        self.kind = kind
        self.num_heads = num_heads

    def __call__(self, x: jax.Array, qkv: QKV | None = None) -> jax.Array:
        """Map tokens [B, T, D] to tokens [B, T, D].

        This block's slices of `concatenate_qkv` select `fused_attention`, None selects `attend`.
        """
        tokens = layers.flatten_tokens(self.norm(x))
        softmax_attention = self._softmax_attention(tokens, x.shape, qkv)
        value = (self.value(tokens) if self.kind.has_values else tokens).reshape(x.shape)
        mixed = self.kind.mix(value, softmax_attention, self.num_heads, self._arrays())
        return mixed if self.out is None else self.out(layers.flatten_tokens(mixed)).reshape(x.shape)

    def matrix(self, x: jax.Array) -> jax.Array:
        """Return the attention matrices for tokens [B, T, D], float32 [B, G, T, T], one for each of G value heads.

        They are the output of attention for the identity as values.
        """
        b, t, _ = x.shape
        groups = self.kind.value_heads(self.num_heads)
        eye = jnp.broadcast_to(jnp.tile(jnp.eye(t), groups), (b, t, groups * t))
        softmax_attention = self._softmax_attention(layers.flatten_tokens(self.norm(x)), x.shape, None)
        rows = self.kind.mix(eye, softmax_attention, self.num_heads, self._arrays())
        return rows.reshape(b, t, groups, t).swapaxes(1, 2)

    def concatenate_qkv(self) -> QKV:
        """Concatenate the projections for `fused_attention`: [..., D, 3 D], and [..., 3 D] or None.

        Call it on the whole stack of blocks: layer by layer, it and its gradient took 55 more kernel launches in a step
        of 12 blocks.
        """
        parts = self.query, self.key, self.value
        biases = [layer.bias[...] for layer in parts if layer.bias is not None]
        kernel = jnp.concatenate([layer.kernel[...] for layer in parts], axis=-1)
        return kernel, jnp.concatenate(biases, axis=-1) if biases else None

    def _softmax_attention(self, tokens: jax.Array, shape: tuple[int, ...], qkv: QKV | None) -> Attend:
        """Return a function that applies the softmax attention of tokens [B * T, D] to values [B, T, H * d]."""
        arrays = self._arrays()
        constants = self.num_heads, arrays.get("attention_bias"), arrays.get("row_scale")
        if not self.kind.has_queries:
            return layers.identity
        if qkv is None:
            query, key = (dense(tokens).reshape(shape) for dense in (self.query, self.key))
            return lambda value: attend(query, key, value, *constants)
        kernel, bias = qkv
        product = tokens.astype(self.value.dtype) @ kernel.astype(self.value.dtype)
        return lambda _: fused_attention.fused(product.reshape(*shape[:2], -1), bias, *constants)

    def _arrays(self) -> dict[str, jax.Array]:
        """Return the constants and parameters of the kind, by name."""
        return {name: getattr(self, name)[...] for name in self.array_names}


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    num_heads: int,
    attention_bias: jax.Array | None = None,
    row_scale: jax.Array | None = None,
) -> jax.Array:
    """Compute multi-head attention row_scale * softmax(q k^T / sqrt(d_head) + attention_bias) v.

    Logits and softmax are float32 for any dtype of the tokens. The arrays [B, H, T, T] kept for the backward pass, and
    its products, have the dtype of the tokens.

    Args:
      query: [B, T, H * d_head].
      key: [B, T, H * d_head].
      value: [B, T, H * d], any d.
      num_heads: H.
      attention_bias: Constant float32 [T, T] for all heads, or [H, T, T], or None. It gets no gradient.
      row_scale: Constant float32 [T], or None. It gets no gradient.

    Returns:
      [B, T, H * d] in the dtype of `value`.
    """
    d_head = query.shape[-1] // num_heads
    return _attend((query * d_head**-0.5, key, value, attention_bias, row_scale), num_heads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attend(inputs: tuple[Any, ...], num_heads: int) -> jax.Array:
    """Compute `attend` with logits q k^T + bias, for (q, k, v, bias, row_scale)."""
    return _forward(inputs, num_heads)[0]


def _forward(inputs: tuple[Any, ...], num_heads: int) -> tuple[jax.Array, Any]:
    q, k, v, bias, row_scale = inputs
    heads = functools.partial(_split_heads, num_heads=num_heads)
    logits = jnp.einsum("bhtd,bhsd->bhts", heads(q), heads(k), preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias.reshape(1, -1, *logits.shape[2:])
    # softmax = exponentials * normalizer; multiplying by the normalizer is cheap after the product with the values.
    exponentials = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    normalizer = 1.0 / jnp.sum(exponentials, axis=-1, keepdims=True)
    exponentials = exponentials.astype(v.dtype)
    scale = normalizer if row_scale is None else normalizer * row_scale[None, None, :, None]
    mixed = scale * jnp.einsum("bhts,bhsd->bhtd", exponentials, heads(v), preferred_element_type=jnp.float32)
    return _join_heads(mixed.astype(v.dtype)), (q, k, v, exponentials, normalizer, scale)


def _backward(num_heads: int, kept: Any, gradient: jax.Array) -> tuple[Any]:
    q, k, v, exponentials, normalizer, scale = kept
    heads = functools.partial(_split_heads, num_heads=num_heads)
    # Scaled before the heads are split. Otherwise XLA folds a transpose into the product for `dv`, which its fast
    # library for CPUs then refuses.
    tokens = gradient.reshape(*gradient.shape[:2], num_heads, -1) * scale.swapaxes(1, 2)
    gradient = tokens.astype(v.dtype).reshape(gradient.shape)
    dweights = jnp.einsum("bhtd,bhsd->bhts", heads(gradient), heads(v)).astype(jnp.float32)
    mean = normalizer * jnp.sum(exponentials * dweights, axis=-1, keepdims=True)
    dlogits = (exponentials * (dweights - mean)).astype(v.dtype)
    dq = jnp.einsum("bhts,bhsd->bhtd", dlogits, heads(k))
    # Sums over t: three times as fast on CPUs if tokens are the last axis of both factors.
    dk, dv = (
        jnp.einsum("bhdt,bhts->bhds", x.swapaxes(2, 3), y).swapaxes(2, 3)
        for x, y in ((heads(q), dlogits), (heads(gradient), exponentials))
    )
    return ((*(_join_heads(x) for x in (dq, dk, dv)), None, None),)


_attend.defvjp(_forward, _backward)


def _split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """[B, T, H * d] -> [B, H, T, d]."""
    return x.reshape(*x.shape[:2], num_heads, -1).swapaxes(1, 2)


def _join_heads(x: jax.Array) -> jax.Array:
    """[B, H, T, d] -> [B, T, H * d]."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)
