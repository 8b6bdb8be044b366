"""The kinds of attention: each is an object in `KINDS` that owns its settings, constants, parameters and checks.

A new kind is a subclass of `AttentionKind` and a row of `KINDS`. Its settings are the fields of `config.model` with the
same names. Checks, training and analysis call the kind; they do not need to know which kinds exist.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from simplest_vit.errors import UserError
from simplest_vit.models import espa, shift

Grid = tuple[int, int]
Arrays = dict[str, Any]
Attend = Callable[[jax.Array], jax.Array]  # applies the attention of given tokens to values [B, T, H * d]


@dataclasses.dataclass(frozen=True)
class AttentionKind:
    """Plain softmax attention, and the methods that other kinds override."""

    has_queries: ClassVar[bool] = True  # whether attention depends on queries and keys
    has_values: ClassVar[bool] = True  # whether values are a projection of the tokens, not the tokens themselves
    # Whether queries start at zero, so that the constants determine the initial attention.
    zero_queries: ClassVar[bool] = False
    parameters: ClassVar[dict[str, float]] = {}  # trainable scalars of each block, with their initial values

    def check(self, grid: Grid, num_heads: int) -> None:
        """Raise a UserError if this kind of attention does not support a token grid and a number of heads."""

    def value_heads(self, num_heads: int) -> int:
        """Return the number of groups of value channels, each of which is mixed by one matrix."""
        return num_heads

    def constants(self, grid: Grid, depth: int, num_heads: int) -> dict[str, np.ndarray]:
        """Return the constants of all blocks, arrays [L, ...].

        `attention_bias` [L, T, T] or [L, H, T, T] is added to the logits, `row_scale` [L, T] multiplies the rows of
        the softmax; `mix` may use others.
        """
        return {}

    def mix(self, value: jax.Array, softmax_attention: Attend, num_heads: int, arrays: Arrays) -> jax.Array:
        """Mix values over tokens, linearly.

        Args:
          value: [B, T, H * d], any d.
          softmax_attention: Function that applies row_scale * softmax(q k^T / sqrt(d_head) + attention_bias) to values.
          num_heads: H.
          arrays: Constants and parameters of this block by name.

        Returns:
          [B, T, H * d].
        """
        return softmax_attention(value)

    def initial_matrix(self, constants: Arrays, num_tokens: int) -> np.ndarray | None:
        """Compute the attention matrices at initialization from the constants of all blocks.

        They are float64 [L or 1, H or 1, T, T], or None if they depend on random weights.
        """
        if not self.zero_queries:
            return None
        bias = np.asarray(constants["attention_bias"], np.float64)
        weights = np.exp(bias - bias.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        weights = weights if weights.ndim == 4 else weights[:, None]
        if "row_scale" in constants:
            weights *= np.asarray(constants["row_scale"], np.float64)[:, None, :, None]
        return weights


@dataclasses.dataclass(frozen=True)
class Shaped(AttentionKind):
    """E-SPA and U-SPA, which start as the matrices A_l that produce prescribed token kernels: `espa.py`."""

    form: str
    at_max_depth: float  # gamma_L, or rho_L for `uspa`

    zero_queries: ClassVar[bool] = True

    def constants(self, grid: Grid, depth: int, num_heads: int) -> dict[str, np.ndarray]:
        """Return log A_l and its row sums."""
        row_scale, bias = espa.shaped_attention(grid, depth, self.at_max_depth, self.form)
        return {"attention_bias": bias, "row_scale": row_scale}


def _espa(form: str) -> Callable[..., AttentionKind]:
    return lambda gamma_max_depth=0.005: Shaped(form, gamma_max_depth)


@dataclasses.dataclass(frozen=True)
class Shift(AttentionKind):
    """Heads that start as translations of the token grid: `shift.py`."""

    uniform_fraction: float = 0.01
    identity_head_fraction: float = 0.75

    zero_queries: ClassVar[bool] = True

    def check(self, grid: Grid, num_heads: int) -> None:
        """Raise a UserError if there are more heads than offsets."""
        num_tokens = grid[0] * grid[1]
        if num_heads > num_tokens:
            raise UserError(
                f"config.model.num_heads={num_heads} must be at most the {num_tokens} tokens, because each head of "
                "shift attention has an offset; choose fewer heads or a smaller config.model.patch_size"
            )

    def sources(self, grid: Grid, depth: int, num_heads: int) -> np.ndarray:
        """Return the token that each head attends to from each token, int [L, H, T]."""
        return shift.sources(shift.head_offsets(num_heads, grid, depth, self.identity_head_fraction), grid)

    def constants(self, grid: Grid, depth: int, num_heads: int) -> dict[str, np.ndarray]:
        """Return the logarithms of the attention matrices."""
        matrices = shift.attention_matrices(self.sources(grid, depth, num_heads), self.uniform_fraction)
        return {"attention_bias": np.log(matrices)}


@dataclasses.dataclass(frozen=True)
class FixedShift(Shift):
    """Shift attention without queries and keys: each head translates its values, and adds a little of their mean."""

    has_queries: ClassVar[bool] = False

    def constants(self, grid: Grid, depth: int, num_heads: int) -> dict[str, np.ndarray]:
        """Return the tokens that the heads attend to."""
        return {"source": self.sources(grid, depth, num_heads)}

    def mix(self, value: jax.Array, softmax_attention: Attend, num_heads: int, arrays: Arrays) -> jax.Array:
        """Translate values instead of multiplying them with [T, T] matrices; see `AttentionKind.mix`."""
        heads = value.reshape(*value.shape[:2], num_heads, -1)
        mean = heads.mean(axis=1, keepdims=True, dtype=jnp.float32).astype(value.dtype)
        moved = shift.translate(heads, arrays["source"])
        return ((1 - self.uniform_fraction) * moved + self.uniform_fraction * mean).reshape(value.shape)

    def initial_matrix(self, constants: Arrays, num_tokens: int) -> np.ndarray:
        """Return the matrices, float64 [L, H, T, T]."""
        return shift.attention_matrices(np.asarray(constants["source"]), self.uniform_fraction)


@dataclasses.dataclass(frozen=True)
class SpatialShift(FixedShift):
    """Constant shifts of groups of channels of the tokens themselves (S2-MLP, arXiv 2106.07477): no parameters."""

    has_values: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class ValueSkipInit(AttentionKind):
    """Attention alpha I + beta softmax(q k^T / sqrt(d_head)), trainable alpha = 1 and beta = 0 at initialization.

    The skip connection inside attention of He et al. (arXiv 2302.10322), equation 4 of arXiv 2311.01906.
    """

    parameters: ClassVar[dict[str, float]] = {"alpha": 1.0, "beta": 0.0}

    def mix(self, value: jax.Array, softmax_attention: Attend, num_heads: int, arrays: Arrays) -> jax.Array:
        """Add the values to the output of softmax attention; see `AttentionKind.mix`."""
        alpha, beta = (arrays[name].astype(value.dtype) for name in ("alpha", "beta"))
        return alpha * value + beta * softmax_attention(value)

    def initial_matrix(self, constants: Arrays, num_tokens: int) -> np.ndarray:
        """Return the identity, float64 [1, 1, T, T]."""
        return np.eye(num_tokens)[None, None]


# Functions from the settings of a kind, which have defaults, to the kind.
KINDS: dict[str, Callable[..., AttentionKind]] = {
    **{form: _espa(form) for form in ("espa", "espa_2d", "espa_reference")},
    "uspa": lambda rho_max_depth=0.8: Shaped("uspa", rho_max_depth),
    "shift": Shift,
    "fixed_shift": FixedShift,
    "spatial_shift": SpatialShift,
    "value_skipinit": ValueSkipInit,
    "softmax": AttentionKind,
}


def settings_of(name: str) -> tuple[str, ...]:
    """Return the names of a kind's settings, which are fields of `config.model`."""
    return tuple(inspect.signature(KINDS[name]).parameters)
