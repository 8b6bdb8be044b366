"""The order of training examples: a random permutation that is never built.

`shuffled` evaluates it at any position in O(1), so a batch needs only (seed, step): nothing is sorted or stored, a
resume costs nothing, and the device and the workers of the host pipeline agree without communicating.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# One example in 2**32 is not moved by any round.
_ROUNDS = 32


def _mix(x: Any) -> Any:
    """Scramble uint32 values with the 32-bit finalizer of MurmurHash3, a bijection."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def shuffled(position: Any, size: int, seed: Any, epoch: Any) -> Any:
    """Find the example at each position of an epoch's random order.

    The swap-or-not shuffle: every round pairs x with (k - x) mod size, and one pseudorandom bit per pair
    decides whether the two trade places. Each round is a permutation of range(size), and so is the result.

    Args:
      position: Positions in [0, size), integer array [B], NumPy or JAX (the result is of the same kind).
      size: Number of examples, below 2**31.
      seed: The run's seed, integer scalar or array [1].
      epoch: Number of the epoch, integer scalar or array [1].

    Returns:
      Example indices, uint32 [B]: over all positions, each of range(size) exactly once.

    References:
      Hoang, Morris, Rogaway, "An Enciphering Scheme Based on a Card Shuffle", 2012.
    """
    on_host = isinstance(position, np.ndarray)
    xp = np if on_host else jnp
    n = np.uint32(size)
    # Arrays of one element, not scalars: NumPy warns of overflow only for scalars, and here it is intended.
    seed, epoch = (xp.asarray(value).astype(np.uint32).reshape(1) for value in (seed, epoch))
    key = _mix(_mix(seed + np.uint32(1)) + epoch)

    def trade_places(r: Any, x: Any) -> Any:
        round_key = key + 2 * xp.asarray(r).astype(np.uint32)
        partner = (_mix(round_key) % n + (n - x)) % n
        bit = _mix(xp.maximum(x, partner) ^ _mix(round_key + np.uint32(1))) & np.uint32(1)
        return xp.where(bit == 1, partner, x)

    x = position.astype(np.uint32)

    def unrolled(x: Any) -> Any:
        return functools.reduce(lambda x, r: trade_places(r, x), range(_ROUNDS), x)

    if on_host:
        return unrolled(x)
    # A loop compiles ten times as fast, but is a hundred launches on a GPU instead of one.
    return jax.lax.platform_dependent(x, cpu=lambda x: jax.lax.fori_loop(0, _ROUNDS, trade_places, x), default=unrolled)
