"""Kinds of attention by which the isometric network might gain from queries: the rows of the table `attention`.

    python -m benchmarks.reproduce attention --workdir runs/attention --data_dir DIR
    python -m benchmarks.attention_ideas train --config ... --config.model.attention=shift_beside_softmax

As a program this is `simplest-vit`, with these kinds besides the package's.

A query of shift attention has to overcome 8.8 nats to reach another token. These kinds lower that barrier for some
heads or blocks, go around it, or start with queries that are not zero; all start as an isometry or near one.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from simplest_vit import commands
from simplest_vit.models.attention_kinds import KINDS, Arrays, Attend, AttentionKind, FixedShift, Grid, Shift


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

    has_queries: ClassVar[bool] = True
    zero_queries: ClassVar[bool] = True

    def constants(self, grid: Grid, depth: int, num_heads: int) -> dict[str, np.ndarray]:
        """Return the constants of both, and whether a block has attention."""
        bias = Shift.constants(self, grid, depth, num_heads)
        return super().constants(grid, depth, num_heads) | bias | {"late": np.arange(depth) >= depth // 2}

    def mix(self, value: jax.Array, softmax_attention: Attend, num_heads: int, arrays: Arrays) -> jax.Array:
        """Mix values by attention in late blocks; see `AttentionKind.mix`."""
        fixed = super().mix(value, softmax_attention, num_heads, arrays)
        return jnp.where(arrays["late"], softmax_attention(value), fixed)


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


IDEAS: dict[str, type[AttentionKind]] = {
    "shift_random_queries": RandomQueries,
    "shift_free_head": FreeHead,
    "shift_two_free_heads": TwoFreeHeads,
    "shift_late": LateAttention,
    "shift_beside_softmax": ShiftBesideSoftmax,
    "four_shifts_beside_softmax": FourShiftsBesideSoftmax,
}


def register() -> None:
    """Add these kinds to the package's."""
    KINDS.update(IDEAS)


if __name__ == "__main__":
    register()
    commands.main()
