"""Vision transformers, with or without normalization and skip connections: one class and one forward pass.

`presets` names the networks. SimpleViT has normalization and skip connections. The other networks have neither; their
initialization preserves the signal at any depth:

- SimplEsT-ViT: E-SPA (`espa.py`) shapes attention and TAT (`tat.py`) shapes the activation, which controls the kernel
  matrices of tokens and images.
- The isometric ViT: shift attention (`shift.py`) and a looks-linear MLP are (almost) orthogonal maps.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplest_vit.errors import UserError
from simplest_vit.models import layers, tat
from simplest_vit.models.attention import QKV, Attention
from simplest_vit.models.attention_kinds import KINDS
from simplest_vit.models.initializers import INITS
from simplest_vit.models.mlp import MLPS

# How a block combines its input x with the output y of attention or an MLP.
SKIPS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "none": lambda x, y: y,
    "residual": lambda x, y: x + y,
    "scaled": lambda x, y: (x + y) * 0.5**0.5,
}


class Block(nnx.Module):
    """Attention, then an MLP."""

    def __init__(self, attention: Attention, mlp: nnx.Module, skip: str):
        self.attention = attention
        self.mlp = mlp
        self.skip = skip

    def __call__(self, x: jax.Array, qkv: QKV | None = None) -> jax.Array:
        """Map tokens [B, T, D] to tokens [B, T, D]; `qkv` as in `Attention`."""
        add = SKIPS[self.skip]
        x = add(x, self.attention(x, qkv))
        return add(x, self.mlp(x))


class ViT(nnx.Module):
    """A vision transformer: patches, position embedding, `depth` blocks, mean over tokens, linear head."""

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
        attention: str,
        mlp: str,
        activation: str,
        init: str,
        norm: str = "none",
        skip: str = "none",
        output_projection: bool = False,
        c_val_0_target: float = 0.9,
        dropout: float = 0.0,
        remat: bool = False,
        attention_kernel: str = "xla",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
        **attention_settings: float,
    ):
        """Initialize parameters (float32) and constants. `presets.model_arguments` creates and checks the arguments.

        Args:
          image_shape: Height, width and channels; height and width are multiples of `patch_size`.
          width: D, a multiple of 4 and of `num_heads`.
          output_projection: Whether attention ends with a projection; its projections then have no biases.
          dropout: Of the tokens before pooling.
          attention_kernel: `xla` (`attention.attend`) or `fused` (`fused_attention`).
          dtype: Compute dtype; softmax, constants, pooling and logits stay float32.
          **attention_settings: Settings of the kind of attention; missing ones take the kind's defaults. This and all
            other arguments are fields of `config.model` (`config.FIELDS`).

        Raises:
          UserError: If TAT has no solution for the depth.
        """
        grid = layers.token_grid(image_shape, patch_size)
        kind = KINDS[attention](**attention_settings)
        initializers = INITS[init]
        slope = tat.solve_negative_slope(2 * depth, c_val_0_target) if activation == "tailored_relu" else 0.0
        shared: dict[str, Any] = {"init": initializers, "norm": norm, "dtype": dtype}

        def create_block(rngs: nnx.Rngs, constants: dict[str, jax.Array]) -> Block:
            return Block(
                Attention(kind, constants, width, num_heads, output_projection=output_projection, rngs=rngs, **shared),
                MLPS[mlp](width, mlp_dim, activation, negative_slope=slope, rngs=rngs, **shared),
                skip,
            )

        patch_dim = patch_size**2 * image_shape[2]
        self.patch_embedding = nnx.Linear(
            patch_dim,
            width,
            kernel_init=initializers.linear,
            bias_init=initializers.bias(patch_dim),
            dtype=dtype,
            rngs=rngs,
        )
        self.position_embedding = layers.Constant(jnp.asarray(layers.sincos_position_embedding(grid, width)))
        self.blocks = layers.stack(create_block, depth, rngs, kind.constants(grid, depth, num_heads))
        self.dropout = nnx.Dropout(dropout)
        self.norm = layers.create_norm(norm, width, rngs=rngs)
        self.head = nnx.Linear(
            width, num_classes, kernel_init=initializers.dense, bias_init=initializers.bias(width), rngs=rngs
        )
        self.image_shape = tuple(image_shape)
        self.patch_size = patch_size
        self.depth = depth
        self.preserves_kernels = initializers.preserves_kernels
        self.remat = remat
        self.attention_kernel = attention_kernel
        self.dtype = dtype

    def __call__(self, image: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """Map normalized images [B, H, W, C] to logits, float32 [B, num_classes]; `dropout_key` turns dropout on."""
        return self.head(self.features(image, dropout_key=dropout_key))

    def features(self, image: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """Map images [B, H, W, C] to the input of the head, float32 [B, D]; `dropout_key` turns dropout on."""
        qkv = self.blocks.attention.concatenate_qkv() if self.attention_kernel == "fused" else None
        x = layers.scan(self.blocks, self.embed(image), qkv, remat=self.remat)
        return self.pool(self.dropout(x, deterministic=dropout_key is None, rngs=dropout_key))

    def embed(self, image: jax.Array) -> jax.Array:
        """Map images [B, H, W, C] to tokens [B, T, D] before the first block; a UserError if their shape is another."""
        if image.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise UserError(f"images: {list(image.shape)} must be [N, {expected}], normalized")
        x = self.patch_embedding(layers.patchify(image, self.patch_size))
        return x + self.position_embedding[...].astype(self.dtype)[None]

    def pool(self, x: jax.Array) -> jax.Array:
        """Map tokens [B, T, D] after the last block to features, float32 [B, D]."""
        return self.norm(x.astype(jnp.float32).mean(axis=1))

    def initial_attention(self) -> np.ndarray | None:
        """Return the attention matrices at initialization, float64 [L, H or 1, T, T].

        None if they depend on random weights.
        """
        attention = self.blocks.attention
        constants = nnx.to_pure_dict(nnx.state(attention, layers.Constant))
        matrix = attention.kind.initial_matrix(constants, len(self.position_embedding[...]))
        return None if matrix is None else np.broadcast_to(matrix, (self.depth, *matrix.shape[1:]))
