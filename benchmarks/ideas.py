"""Ideas for the isometric network, not in the package: kinds of attention, and optimizers.

    python -m benchmarks.reproduce attention --workdir runs/attention --data_dir DIR
    python -m benchmarks.ideas train --config ... --config.model.attention=shift_beside_softmax

As a program this is `simplest-vit`, with these kinds and optimizers besides the package's.

A query of shift attention has to overcome 8.8 nats to reach another token. Kinds with queries lower that barrier for
some heads or blocks, go around it, or start with queries that are not zero. All kinds start as an isometry or near one.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simplest_vit import commands
from simplest_vit.models import attention_kinds
from simplest_vit.models.attention_kinds import Arrays, Attend, AttentionKind, FixedShift, Grid, Shift
from simplest_vit.optimizers import factory, paths
from simplest_vit.optimizers.shampoo import soap


@dataclasses.dataclass(frozen=True)
class RandomQueries(Shift):
    """Shift attention whose queries are drawn like its keys, so that keys have a gradient from the start."""

    zero_queries: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class FreeHead(Shift):
    """Shift attention in which the first head of each block starts uniform: nothing keeps it from any token."""

    free: ClassVar[int] = 1

    def constants(self, grid: Grid, depth: int, num_heads: int) -> dict[str, np.ndarray]:
        """Return the logarithms of the attention matrices up to a constant."""
        bias = super().constants(grid, depth, num_heads)["attention_bias"]
        bias[:, : self.free] = 0
        return {"attention_bias": bias}


@dataclasses.dataclass(frozen=True)
class TwoFreeHeads(FreeHead):
    """As `FreeHead`, with two heads."""

    free: ClassVar[int] = 2


@dataclasses.dataclass(frozen=True)
class LateAttention(FixedShift):
    """Constant shifts in the first half of the blocks, shift attention in the second."""

    first: ClassVar[float] = 0.5  # of the depth: where attention begins
    has_queries: ClassVar[bool] = True
    zero_queries: ClassVar[bool] = True

    def constants(self, grid: Grid, depth: int, num_heads: int) -> dict[str, np.ndarray]:
        """Return the constants of both, and whether a block has attention."""
        bias = Shift.constants(self, grid, depth, num_heads)
        return super().constants(grid, depth, num_heads) | bias | {"late": np.arange(depth) >= self.first * depth}

    def mix(self, value: jax.Array, softmax_attention: Attend, num_heads: int, arrays: Arrays) -> jax.Array:
        """Mix values by attention in late blocks; see `AttentionKind.mix`."""
        fixed = super().mix(value, softmax_attention, num_heads, arrays)
        return jnp.where(arrays["late"], softmax_attention(value), fixed)


@dataclasses.dataclass(frozen=True)
class LastQuarterAttention(LateAttention):
    """As `LateAttention`, with attention in the last quarter of the blocks."""

    first: ClassVar[float] = 0.75


@dataclasses.dataclass(frozen=True)
class ShiftWithoutValues(Shift):
    """Shift attention applied to the tokens themselves: the MLP before them already mixes channels."""

    has_values: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class ShiftBesideSoftmax(FixedShift):
    """Heads alpha A_h + beta softmax(q k^T / sqrt(d_head)): constant shifts A_h, trainable alpha = 1 and beta = 0.

    Value-SkipInit (arXiv 2302.10322) with shifts in place of the identity: no barrier for queries.
    """

    has_queries: ClassVar[bool] = True
    parameters: ClassVar[dict[str, float]] = {"alpha": 1.0, "beta": 0.0}

    def mix(self, value: jax.Array, softmax_attention: Attend, num_heads: int, arrays: Arrays) -> jax.Array:
        """Add attention to the shifted values; see `AttentionKind.mix`."""
        alpha, beta = (arrays[name].astype(value.dtype) for name in ("alpha", "beta"))
        return alpha * super().mix(value, softmax_attention, num_heads, arrays) + beta * softmax_attention(value)


@dataclasses.dataclass(frozen=True)
class FourShiftsBesideSoftmax(ShiftBesideSoftmax):
    """As `ShiftBesideSoftmax`, with four shifts beside each softmax head: few wide heads make a step cheaper."""

    def value_heads(self, num_heads: int) -> int:
        """Return the number of shifts."""
        return 4 * num_heads

    def check(self, grid: Grid, num_heads: int) -> None:
        """Check the number of shifts; see `Shift.check`."""
        super().check(grid, self.value_heads(num_heads))

    def constants(self, grid: Grid, depth: int, num_heads: int) -> dict[str, np.ndarray]:
        """Return the tokens that the shifts attend to."""
        return super().constants(grid, depth, self.value_heads(num_heads))

    def mix(self, value: jax.Array, softmax_attention: Attend, num_heads: int, arrays: Arrays) -> jax.Array:
        """Add attention to the shifted values; see `AttentionKind.mix`."""
        return super().mix(value, softmax_attention, self.value_heads(num_heads), arrays)


KINDS: dict[str, type[AttentionKind]] = {
    "shift_random_queries": RandomQueries,
    "shift_free_head": FreeHead,
    "shift_two_free_heads": TwoFreeHeads,
    "shift_late": LateAttention,
    "shift_last_quarter": LastQuarterAttention,
    "shift_without_values": ShiftWithoutValues,
    "shift_beside_softmax": ShiftBesideSoftmax,
    "four_shifts_beside_softmax": FourShiftsBesideSoftmax,
}


def pull_to_isometry(learning_rate: optax.ScalarOrSchedule, pull: float) -> optax.GradientTransformation:
    """Add `-pull * learning_rate * (W W^T - I) W` to the updates of values and MLPs, which start as isometries.

    W is a kernel of the values [D, D], or the half of an MLP's kernel [D, M / 2] or [M / 2, D]; for the latter the term
    is W (W^T W - I). Goes after an optimizer.
    """
    parts = {"value": (1, -1), "dense1": (2, -1), "dense2": (2, -2)}  # number of isometries in a kernel, and their axis

    def init(params: optax.Params) -> jax.Array:
        del params
        return jnp.zeros((), jnp.int32)

    def update(updates: Any, count: jax.Array, params: Any) -> tuple[Any, jax.Array]:
        rate = learning_rate(count) if callable(learning_rate) else learning_rate

        def one(path: Any, update: jax.Array, kernel: jax.Array) -> jax.Array:
            layer = paths.path_names(path)[-2]
            if not paths.is_kernel(path) or layer not in parts:
                return update
            number, axis = parts[layer]
            excess = [_excess(w) for w in jnp.split(kernel, number, axis)]
            return update - pull * rate * jnp.concatenate(excess, axis)

        return jax.tree_util.tree_map_with_path(one, updates, params), count + 1

    return optax.GradientTransformation(init, update)


def _excess(w: jax.Array) -> jax.Array:
    """(W W^T - I) W for [..., n, m], n <= m, else W (W^T W - I): zero if all singular values are 1."""
    product = w @ w.mT @ w if w.shape[-2] <= w.shape[-1] else w @ (w.mT @ w)
    return product - w


def soap_near_isometry(
    learning_rate: optax.ScalarOrSchedule, pull: float = 0.0, start_preconditioning_step: int = 10
) -> optax.GradientTransformation:
    """SOAP, and after it `pull_to_isometry`."""
    tx = soap(learning_rate, start_preconditioning_step=start_preconditioning_step, stack_axes=paths.stack_axes)
    return optax.chain(tx, pull_to_isometry(learning_rate, pull))


def adam_by_shape(learning_rate: optax.ScalarOrSchedule, b2: float = 0.999) -> optax.GradientTransformation:
    """Adam whose updates of kernels [in, out] are multiplied by 64 / sqrt(in * out): equal spectral norms, roughly."""

    def scale(updates: Any, _: Any) -> Any:
        def one(path: Any, update: jax.Array) -> jax.Array:
            return update * (64 / math.sqrt(math.prod(update.shape[-2:])) if paths.is_kernel(path) else 1)

        return jax.tree_util.tree_map_with_path(one, updates)

    return optax.chain(optax.adam(learning_rate, b2=b2), optax.stateless(scale))


OPTIMIZERS = {"soap_near_isometry": soap_near_isometry, "adam_by_shape": adam_by_shape}


def register() -> None:
    """Add these kinds and optimizers to the package's."""
    attention_kinds.KINDS.update(KINDS)
    factory.optimizers().update(OPTIMIZERS)


if __name__ == "__main__":
    register()
    commands.main()
