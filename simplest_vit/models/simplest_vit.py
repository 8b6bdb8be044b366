"""SimplEsT-ViT: a vision transformer without normalization and without skip connections.

Two ways to have the signal at initialization survive any depth; nothing else keeps it alive:

- E-SPA (`espa.py`) shapes the attention and TAT (`tat.py`) the activation: kernels of tokens and images are controlled.
- Isometry: shift attention (`shift.py`) and a mirrored MLP, which are orthogonal maps at initialization.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import zeros

from simplest_vit.models import espa, initializers, layers, shift, tat

# Ways to shape attention: the forms of E-SPA, shifts, Value-SkipInit, and the contrast that collapses.
ATTENTIONS = (*espa.FORMS, "shift", "fixed_shift", "value_skipinit", "unshaped")
# Activations of each MLP; those of the mirrored one have phi(z) - phi(-z) = z.
_MIRRORED: dict[str, Callable] = {"gelu": layers.gelu, "silu": jax.nn.silu, "relu": jax.nn.relu}
MLPS = {"shaped": ("tailored_relu", "relu"), "mirrored": tuple(_MIRRORED)}
INITS = ("paper", "reference", "isometric")


class ShapedAttention(nnx.Module):
    """Attention row_scale * softmax(q k^T / sqrt(d_head) + attention_bias) v, without output projection.

    Queries start at zero, so that at initialization the attention matrix is A_l exactly (E-SPA, arXiv 2302.10322).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        attention_bias: jax.Array,
        row_scale: jax.Array | None = None,
        *,
        value_init: Callable = initializers.gaussian_fan_in,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        dense = functools.partial(nnx.Linear, width, width, dtype=dtype, rngs=rngs)
        self.query = dense(kernel_init=zeros)
        self.key = dense(kernel_init=initializers.gaussian_fan_in)
        self.value = dense(kernel_init=value_init)
        self.attention_bias = layers.Constant(attention_bias)
        self.row_scale = None if row_scale is None else layers.Constant(row_scale)
        self.num_heads = num_heads

    def __call__(self, x: jax.Array, joined: layers.Joined | None = None) -> jax.Array:
        """Map tokens [B, T, D] to tokens [B, T, D]; `joined` as in `layers.project_and_attend`."""
        return layers.project_and_attend(
            x,
            self.query,
            self.key,
            self.value,
            joined,
            self.num_heads,
            self.attention_bias[...],
            None if self.row_scale is None else self.row_scale[...],
        )


class FixedShift(nnx.Module):
    """Shift attention without queries and keys: token mixing by constant matrices, out_h = A_h (x W_h)."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        attention_bias: jax.Array,
        *,
        value_init: Callable = initializers.gaussian_fan_in,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.value = nnx.Linear(width, width, kernel_init=value_init, dtype=dtype, rngs=rngs)
        self.matrix = layers.Constant(jax.nn.softmax(attention_bias, axis=-1))
        self.num_heads = num_heads

    def __call__(self, x: jax.Array, joined: layers.Joined | None = None) -> jax.Array:
        """Map tokens [B, T, D] to tokens [B, T, D]."""
        (value,) = layers.project(x, self.value)
        heads = value.reshape(*x.shape[:2], self.num_heads, -1)
        return jnp.einsum("hts,bshd->bthd", self.matrix[...].astype(value.dtype), heads).reshape(x.shape)


class UnshapedAttention(nnx.Module):
    """Plain softmax attention: in a deep stack without skips all tokens collapse to one."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        value_init: Callable = initializers.gaussian_fan_in,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        dense = functools.partial(nnx.Linear, width, width, dtype=dtype, rngs=rngs)
        self.query, self.key = (dense(kernel_init=initializers.gaussian_fan_in) for _ in range(2))
        self.value = dense(kernel_init=value_init)
        self.num_heads = num_heads

    def __call__(self, x: jax.Array, joined: layers.Joined | None = None) -> jax.Array:
        """Map tokens [B, T, D] to tokens [B, T, D]; `joined` as in `layers.project_and_attend`."""
        return layers.project_and_attend(x, self.query, self.key, self.value, joined, self.num_heads)


class ValueSkipInit(UnshapedAttention):
    """Attention (alpha I + beta softmax(q k^T / sqrt(d_head))) v, trainable alpha = 1 and beta = 0 at initialization.

    The skip inside the attention of He et al. (arXiv 2302.10322), equation 4 of arXiv 2311.01906.
    """

    def __init__(self, width: int, num_heads: int, **options: Any):
        super().__init__(width, num_heads, **options)
        self.alpha = nnx.Param(jnp.ones((), jnp.float32))
        self.beta = nnx.Param(jnp.zeros((), jnp.float32))

    def __call__(self, x: jax.Array, joined: layers.Joined | None = None) -> jax.Array:
        """Map tokens [B, T, D] to tokens [B, T, D]; `joined` as in `layers.project_and_attend`."""
        mixed = super().__call__(x, joined)
        (value,) = layers.project(x, self.value)  # the same product as inside, where that is by XLA
        return self.alpha[...].astype(x.dtype) * value + self.beta[...].astype(x.dtype) * mixed


class ShapedMLP(nnx.Module):
    """Two `Dense -> TReLU` layers, D -> M -> D."""

    def __init__(
        self,
        width: int,
        mlp_dim: int,
        negative_slope: float,
        kernel_init: Callable,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        dense = functools.partial(nnx.Linear, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
        self.dense1 = dense(width, mlp_dim)
        self.dense2 = dense(mlp_dim, width)
        self.negative_slope = negative_slope

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tokens [B, T, D] to tokens [B, T, D]."""
        tokens = tat.tailored_relu(self.dense1(layers.rows(x)), self.negative_slope)
        return tat.tailored_relu(self.dense2(tokens), self.negative_slope).reshape(x.shape)


class MirroredMLP(nnx.Module):
    """`Dense -> activation -> Dense`, D -> M -> D: an orthogonal map at initialization (`mirrored_kernels`)."""

    def __init__(self, width: int, mlp_dim: int, activation: Callable, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        first, second = initializers.mirrored_kernels(rngs.params(), width, mlp_dim)
        dense = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
        self.dense1 = dense(width, mlp_dim, kernel_init=lambda *_: first)
        self.dense2 = dense(mlp_dim, width, kernel_init=lambda *_: second)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tokens [B, T, D] to tokens [B, T, D]."""
        return self.dense2(layers.activate(layers.rows(x), self.dense1, self.activation)).reshape(x.shape)


class Block(nnx.Module):
    """Attention, then MLP: no normalization, no skip connection."""

    def __init__(self, attention: nnx.Module, mlp: nnx.Module):
        self.attention = attention
        self.mlp = mlp

    def __call__(self, x: jax.Array, joined: layers.Joined | None = None) -> jax.Array:
        """Map tokens [B, T, D] to tokens [B, T, D]; `joined` as in `layers.project_and_attend`."""
        return self.mlp(self.attention(x, joined))


class SimplestViT(nnx.Module):
    """The model: patches, position embedding, `depth` blocks, mean over tokens, linear head."""

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
        attention: str = "espa",
        gamma_max_depth: float = 0.005,
        rho_max_depth: float = 0.8,
        shift_eps: float = 0.01,
        shift_in_place: float = 0.75,
        mlp: str = "shaped",
        activation: str = "tailored_relu",
        c_val_0_target: float = 0.9,
        init: str = "paper",
        dropout: float = 0.0,
        remat: bool = False,
        attention_kernel: str = "xla",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Initialize parameters (float32) and constants.

        Args:
          image_shape: Height, width and channels; height and width are multiples of `patch_size`.
          num_classes: Number of classes.
          patch_size: Side of a patch in pixels.
          depth: Number of blocks L.
          width: Model width D, a multiple of 4 and of `num_heads`.
          num_heads: Attention heads.
          mlp_dim: Hidden width of the MLP.
          attention: One of `ATTENTIONS`.
          gamma_max_depth: E-SPA's decay rate at the last block.
          rho_max_depth: U-SPA's correlation at the last block.
          shift_eps: Share of uniform attention in shift attention, in [0, 1).
          shift_in_place: Share of the heads that start in place in shift attention, in (0, 1].
          mlp: One of `MLPS`, `shaped` or `mirrored`.
          activation: One of those of `MLPS`: `tailored_relu`, or `relu` (slope 0) as a contrast, for the shaped MLP.
          c_val_0_target: TAT's eta.
          init: Of values and patch embedding, Gaussian or (`isometric`) orthogonal; `reference` for the PyTorch
            reference's orthogonal scale of MLP and head.
          dropout: Rate on the tokens before pooling.
          remat: Recompute blocks in the backward pass.
          attention_kernel: `xla` or `fused`; see `layers.project_and_attend`.
          dtype: Compute dtype; softmax, constants and logits stay float32.
          rngs: Streams for the initialization.

        Raises:
          ValueError: If TAT has no solution for the depth, or shift attention has more heads than tokens. Names are
            checked by `factory.model_arguments`.
        """
        grid = layers.token_grid(image_shape, patch_size)
        orthogonal = (
            initializers.reference_orthogonal if init == "reference" else initializers.scaled_uniform_orthogonal
        )
        embedding_init = orthogonal if init == "isometric" else initializers.gaussian_fan_in
        shaping: tuple[np.ndarray, ...] = ()  # constants of each block, [L, ...]
        attention_class: Callable = ShapedAttention
        if attention in ("shift", "fixed_shift"):
            attention_class = ShapedAttention if attention == "shift" else FixedShift
            offsets = shift.head_offsets(num_heads, grid, depth, shift_in_place)
            shaping = (shift.attention_bias(offsets, grid, shift_eps),)
        elif attention in espa.FORMS:
            row_scale, bias = espa.shaped_attention(grid, depth, gamma_max_depth, attention, rho_max_depth)
            shaping = bias, row_scale
        else:
            attention_class = {"value_skipinit": ValueSkipInit, "unshaped": UnshapedAttention}[attention]
        if mlp == "mirrored":
            create_mlp: Callable = functools.partial(MirroredMLP, width, mlp_dim, _MIRRORED[activation])
        else:
            slope = tat.solve_negative_slope(2 * depth, c_val_0_target) if activation == "tailored_relu" else 0.0
            create_mlp = functools.partial(ShapedMLP, width, mlp_dim, slope, orthogonal)

        def block(rngs: nnx.Rngs, *shaping: jax.Array) -> Block:
            return Block(
                attention_class(
                    width,
                    num_heads,
                    *shaping,
                    value_init=embedding_init,
                    dtype=dtype,
                    rngs=rngs,
                ),
                create_mlp(dtype=dtype, rngs=rngs),
            )

        self.patch_embedding = nnx.Linear(
            patch_size**2 * image_shape[2], width, kernel_init=embedding_init, dtype=dtype, rngs=rngs
        )
        self.position_embedding = layers.Constant(jnp.asarray(layers.sincos_position_embedding(grid, width)))
        self.blocks = layers.stack(block, depth, rngs, *shaping)
        self.dropout = nnx.Dropout(dropout)
        self.head = nnx.Linear(width, num_classes, kernel_init=orthogonal, rngs=rngs)
        self.patch_size = patch_size
        self.remat = remat
        self.attention_kernel = attention_kernel
        self.dtype = dtype

    def __call__(self, image: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """Classify images.

        Args:
          image: Normalized images [B, H, W, C].
          dropout_key: Turns dropout on.

        Returns:
          Logits, float32 [B, num_classes].
        """
        joined = None
        if self.attention_kernel == "fused" and hasattr(self.blocks.attention, "query"):
            joined = layers.join_projections(self.blocks.attention)
        x = self.patch_embedding(layers.patchify(image, self.patch_size))
        x = x + self.position_embedding[...].astype(self.dtype)[None]
        x = layers.scan(self.blocks, x, joined, remat=self.remat)
        x = self.dropout(x, deterministic=dropout_key is None, rngs=dropout_key)
        return self.head(x.astype(jnp.float32).mean(axis=1))
