"""Parts of a network: patches, positions, activations, and a scan over stacked blocks."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

# `scan` unrolls stacks of up to this many layers. A loop would copy the arrays of the backward pass into zero-filled
# arrays of all layers and out again, which takes 9 % of a step of S/4 at batch 64 on a CPU.
_MAX_UNROLLED = 12


class Constant(nnx.Variable):
    """An array of the model that is not trained: never decayed, preconditioned or averaged."""


def sincos_position_embedding(grid: tuple[int, int], width: int) -> np.ndarray:
    """Compute the fixed 2-D position embedding of SimpleViT (arXiv 2205.01580), [sin x, cos x, sin y, cos y].

    Args:
      grid: Rows and columns of patches; T = rows * columns, in raster order.
      width: D, a multiple of 4 and at least 8.

    Returns:
      float32 [T, D], frequencies omega_k = 10000^(-k / (D/4 - 1)).
    """
    y, x = np.mgrid[: grid[0], : grid[1]]
    omega = 10_000.0 ** -(np.arange(width // 4) / (width // 4 - 1))
    y, x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1).astype(np.float32)


def token_grid(image_shape: Sequence[int], patch_size: int) -> tuple[int, int]:
    """Return rows and columns of the patches of an image [H, W, C]; T = rows * columns."""
    return image_shape[0] // patch_size, image_shape[1] // patch_size


def patchify(image: jax.Array, patch_size: int) -> jax.Array:
    """Cut images [B, H, W, C] into flat patches [B, T, P * P * C], patches and pixels in raster order."""
    b, _, _, c = image.shape
    rows, columns = token_grid(image.shape[1:], patch_size)
    x = image.reshape(b, rows, patch_size, columns, patch_size, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * columns, patch_size * patch_size * c)


def flatten_tokens(x: jax.Array) -> jax.Array:
    """Reshape tokens [B, T, D] to [B * T, D], for layers that act on each token alone.

    The gradient of a kernel is then one plain product. If it is summed over batch and tokens, XLA first transposes the
    operands: 66 ms instead of 17 ms for an MLP kernel of S/4 at batch 64 on a CPU.
    """
    return x.reshape(-1, x.shape[-1])


def tall_dot_general(x: jax.Array, kernel: jax.Array, *arguments: Any, **options: Any) -> jax.Array:
    """Compute `jax.lax.dot_general` of tokens [N, M] and a kernel [M, D], M > D, which is transposed in memory.

    Its gradient is then a product [D, N] [N, M], which CPUs compute about twice as fast as [M, N] [N, D]. The barrier
    keeps XLA from turning one into the other.
    """
    return jax.lax.dot_general(x, jax.lax.optimization_barrier(kernel.T).T, *arguments, **options)


def gelu(x: jax.Array) -> jax.Array:
    """Compute the exact GELU x Phi(x) (arXiv 1606.08415) by the error function, as PyTorch does.

    `jax.nn.gelu` uses the complementary error function, which is three times slower on a CPU. Both are within 2e-7 |x|.
    """
    z = x.astype(jnp.float32)
    return (0.5 * z * (1 + jax.lax.erf(z * 0.5**0.5))).astype(x.dtype)


def dense_activation(x: jax.Array, dense: nnx.Linear, activation: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Compute `activation(dense(x))`, [N, D] -> [N, M], and keep only the product for the backward pass.

    Without this, exact GELU also keeps its input and its distribution function: 4.4 GB and 2.2 ms of the step of S/4
    at batch 2048, as compiled for an H200. The dtype is that of `dense`, which has a bias.
    """
    assert dense.bias is not None
    product = x.astype(dense.dtype) @ dense.kernel[...].astype(dense.dtype)
    bias = dense.bias[...].astype(dense.dtype)[None]
    return jax.checkpoint(lambda product, bias: activation(product + bias))(product, bias)


def stack(create: Callable[..., Any], depth: int, rngs: nnx.Rngs, constants: dict[str, np.ndarray]) -> Any:
    """Create `depth` blocks as one module whose arrays have a leading layer axis.

    Args:
      create: Makes a block from `rngs` and one slice of each constant.
      depth: L.
      rngs: Split into one stream for each block.
      constants: Arrays [L, ...]; floats are converted to float32, integers to int32.

    Returns:
      The stacked module; apply it with `scan`.
    """

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=(0, 0), out_axes=0)
    def create_stacked(rngs: nnx.Rngs, constants: dict[str, jax.Array]) -> Any:
        return create(rngs, constants)

    def narrow(array: np.ndarray) -> jax.Array:
        return jnp.asarray(array, jnp.int32 if np.issubdtype(array.dtype, np.integer) else jnp.float32)

    return create_stacked(rngs, {name: narrow(array) for name, array in constants.items()})


@jax.custom_vjp
def all_gather_params(params: Any) -> Any:
    """Gather parameters that are sharded over the current mesh, so that every device computes with complete ones.

    Without this, XLA moves activations to the shards of some kernels instead. Gradients are left to XLA, which
    reduce-scatters them.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return params
    return jax.lax.with_sharding_constraint(params, PartitionSpec())


all_gather_params.defvjp(lambda params: (all_gather_params(params), None), lambda _, gradient: (gradient,))


def scan(blocks: Any, x: jax.Array, *per_layer: Any, remat: bool = False) -> jax.Array:
    """Apply stacked blocks one after another. One block is traced at any depth; from depth 13 on, it runs in a loop.

    Args:
      blocks: A module from `stack`.
      x: Tokens [B, T, D].
      *per_layer: Further arguments of the blocks: trees of arrays [L, ...], of which each block gets its slices.
      remat: Recompute each block in the backward pass: memory for one block instead of all, at a third more FLOPs.

    Returns:
      Tokens [B, T, D].
    """
    graphdef, state = nnx.split(blocks)
    layers = nnx.as_pure(state), per_layer
    depth = jax.tree.leaves(layers)[0].shape[0]

    def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        block, arguments = all_gather_params(layer)
        return nnx.merge(graphdef, block)(x, *arguments), None

    return jax.lax.scan(jax.checkpoint(body) if remat else body, x, layers, unroll=depth <= _MAX_UNROLLED)[0]


def identity(x: jax.Array) -> jax.Array:
    """Return x."""
    return x


def create_norm(name: str, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32) -> Callable:
    """Create a normalization over the last axis: `layer_norm` with PyTorch's epsilon of 1e-5, or `none`."""
    return identity if name == "none" else nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)


NORMS = ("none", "layer_norm")
