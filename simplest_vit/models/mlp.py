"""MLPs by name: two dense layers D -> M -> D that act on each token, after an optional normalization."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplest_vit.errors import UserError
from simplest_vit.models import initializers, layers, tat

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": layers.gelu,
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


class PlainMLP(nnx.Module):
    """`Dense -> activation -> Dense`, as in SimpleViT."""

    activations = tuple(_ACTIVATIONS)  # the first is the default

    def __init__(
        self,
        width: int,
        mlp_dim: int,
        activation: str,
        *,
        init: initializers.Init,
        norm: str,
        negative_slope: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """Initialize parameters (float32); D is the width, M the `mlp_dim`, the slope is that of `TatMLP`."""
        self.norm = layers.create_norm(norm, width, dtype=dtype, rngs=rngs)
        first, second = self._kernel_inits(init, width, mlp_dim, rngs)
        self.dense1 = nnx.Linear(width, mlp_dim, kernel_init=first, bias_init=init.bias(width), dtype=dtype, rngs=rngs)
        self.dense2 = nnx.Linear(
            mlp_dim,
            width,
            kernel_init=second,
            bias_init=init.bias(mlp_dim),
            dot_general=layers.tall_dot_general,
            dtype=dtype,
            rngs=rngs,
        )
        self.activation = activation
        self.negative_slope = negative_slope

    @staticmethod
    def check(width: int, mlp_dim: int) -> None:
        """Raise a UserError if the MLP does not support these sizes."""

    @staticmethod
    def _kernel_inits(init: initializers.Init, width: int, mlp_dim: int, rngs: nnx.Rngs) -> tuple[Callable, Callable]:
        return init.dense, init.dense

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tokens [B, T, D] to tokens [B, T, D]."""
        tokens = self.norm(layers.flatten_tokens(x))
        hidden = layers.dense_activation(tokens, self.dense1, _ACTIVATIONS[self.activation])
        return self.dense2(hidden).reshape(x.shape)

    def initial_c_map(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """Return the map of cosines between tokens by the MLP at initialization, in the limit of infinite width.

        Mean squares are unchanged. None if there is no closed form.
        """
        return None


class LooksLinearMLP(PlainMLP):
    """`Dense -> activation -> Dense`, an orthogonal map at initialization (`initializers.looks_linear_kernels`)."""

    @staticmethod
    def check(width: int, mlp_dim: int) -> None:
        """Raise a UserError if there are fewer than two mirrored units for each channel."""
        if mlp_dim % 2 or mlp_dim < 2 * width:
            raise UserError(
                f"config.model.mlp_dim={mlp_dim} must be even and at least {2 * width}, twice the width, for "
                f"mlp='looks_linear'; try {4 * width}"
            )

    @staticmethod
    def _kernel_inits(init: initializers.Init, width: int, mlp_dim: int, rngs: nnx.Rngs) -> tuple[Callable, Callable]:
        first, second = initializers.looks_linear_kernels(rngs.params(), width, mlp_dim)
        return lambda *_: first, lambda *_: second

    def initial_c_map(self) -> Callable[[np.ndarray], np.ndarray]:
        """Return the identity, because the MLP is orthogonal."""
        return lambda cosine: cosine


class TatMLP(PlainMLP):
    """Two `Dense -> TReLU` layers, whose slope TAT solves for the depth; slope 0 gives ReLU, as a contrast."""

    activations = ("tailored_relu", "relu")

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tokens [B, T, D] to tokens [B, T, D]."""
        tokens = self.norm(layers.flatten_tokens(x))
        hidden = tat.tailored_relu(self.dense1(tokens), self.negative_slope)
        return tat.tailored_relu(self.dense2(hidden), self.negative_slope).reshape(x.shape)

    def initial_c_map(self) -> Callable[[np.ndarray], np.ndarray]:
        """Return the C-map of both activations. The scales of the dense layers cancel, also the reference's."""
        return lambda cosine: tat.composed_c_map(cosine, self.negative_slope, 2)


MLPS = {"tat": TatMLP, "looks_linear": LooksLinearMLP, "plain": PlainMLP}
