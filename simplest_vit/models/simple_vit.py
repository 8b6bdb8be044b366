"""SimpleViT, the baseline: a pre-LayerNorm vision transformer (Beyer et al., arXiv 2205.01580).

Initialization, epsilon and GELU are those of the PyTorch reference, which leaves PyTorch's defaults.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from simplest_vit.models import layers
from simplest_vit.models.initializers import uniform_fan_in


def _dense(fan_in: int, fan_out: int, *, dtype: jnp.dtype, rngs: nnx.Rngs, use_bias: bool = True) -> nnx.Linear:
    init = uniform_fan_in(fan_in)
    return nnx.Linear(fan_in, fan_out, use_bias=use_bias, kernel_init=init, bias_init=init, dtype=dtype, rngs=rngs)


class Attention(nnx.Module):
    """Pre-LayerNorm softmax attention with output projection; no biases."""

    def __init__(self, width: int, num_heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        dense = functools.partial(_dense, width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.query, self.key, self.value, self.out = dense(), dense(), dense(), dense()
        self.num_heads = num_heads

    def __call__(self, x: jax.Array, joined: layers.Joined | None = None) -> jax.Array:
        """Map tokens [B, T, D] to tokens [B, T, D]; `joined` as in `layers.project_and_attend`."""
        mixed = layers.project_and_attend(self.norm(x), self.query, self.key, self.value, joined, self.num_heads)
        return layers.project(mixed, self.out)[0]


class MLP(nnx.Module):
    """Pre-LayerNorm MLP with exact GELU, D -> M -> D."""

    def __init__(self, width: int, mlp_dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.dense1 = _dense(width, mlp_dim, dtype=dtype, rngs=rngs)
        self.dense2 = _dense(mlp_dim, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tokens [B, T, D] to tokens [B, T, D]."""
        return self.dense2(layers.activate(self.norm(layers.rows(x)), self.dense1, layers.gelu)).reshape(x.shape)


class Block(nnx.Module):
    """Attention and MLP, each on a skip connection."""

    def __init__(self, width: int, num_heads: int, mlp_dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attention = Attention(width, num_heads, dtype=dtype, rngs=rngs)
        self.mlp = MLP(width, mlp_dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, joined: layers.Joined | None = None) -> jax.Array:
        """Map tokens [B, T, D] to tokens [B, T, D]; `joined` as in `layers.project_and_attend`."""
        x = x + self.attention(x, joined)
        return x + self.mlp(x)


class SimpleViT(nnx.Module):
    """The model: patches, position embedding, `depth` blocks, mean over tokens, LayerNorm, linear head."""

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        patch_size: int,
        depth: int,
        width: int,
        num_heads: int,
        mlp_dim: int,
        dropout: float = 0.0,
        remat: bool = False,
        attention_kernel: str = "xla",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Initialize parameters (float32); arguments as in `SimplestViT`."""
        grid = layers.token_grid(image_shape, patch_size)
        self.patch_embedding = _dense(patch_size**2 * image_shape[2], width, dtype=dtype, rngs=rngs)
        self.position_embedding = layers.Constant(jnp.asarray(layers.sincos_position_embedding(grid, width)))
        block = functools.partial(Block, width, num_heads, mlp_dim, dtype=dtype)
        self.blocks = layers.stack(lambda rngs: block(rngs=rngs), depth, rngs)
        self.dropout = nnx.Dropout(dropout)
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.head = _dense(width, num_classes, dtype=jnp.float32, rngs=rngs)
        self.patch_size = patch_size
        self.remat = remat
        self.attention_kernel = attention_kernel
        self.dtype = dtype

    def __call__(self, image: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """Classify images [B, H, W, C]; `dropout_key` turns dropout on. Returns logits, float32 [B, num_classes]."""
        joined = layers.join_projections(self.blocks.attention) if self.attention_kernel == "fused" else None
        x = self.patch_embedding(layers.patchify(image, self.patch_size))
        x = x + self.position_embedding[...].astype(self.dtype)[None]
        x = layers.scan(self.blocks, x, joined, remat=self.remat)
        x = self.dropout(x, deterministic=dropout_key is None, rngs=dropout_key)
        return self.head(self.norm(x.astype(jnp.float32).mean(axis=1)))
