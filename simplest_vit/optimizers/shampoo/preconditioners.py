"""Statistics of gradients, products along the axes of stacked blocks, and whose turn it is to be recomputed."""

import itertools
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .moments import accumulate
from .options import Options
from .plan import Plan, Stack


class Factor(NamedTuple):
    """The state of one axis of one stack of blocks: a slot for each block.

    Attributes:
      statistics: (N, n, n), the average of G G^T over this axis, without bias correction.
      preconditioner: (N, n, n), the inverse root (Shampoo) or the eigenbasis (SOAP).
      residual: (N,) float32, how inaccurate the last one computed was.
      rejections: (N,) int32, how many were computed and rejected.
    """

    statistics: jax.Array
    preconditioner: jax.Array
    residual: jax.Array
    rejections: jax.Array


Factors = tuple[Factor, ...]  # by preconditioned axis


def init_factors(stack: Stack, options: Options, statistics: Any = 0.0, preconditioner: float = 1.0) -> Factors:
    """Make the factors of a stack before the first gradient: multiples of the identity."""

    def factor(n: int) -> Factor:
        eyes = jnp.broadcast_to(jnp.eye(n, dtype=options.dtype), (stack.count, n, n))
        zeros = jnp.zeros(stack.count, jnp.float32), jnp.zeros(stack.count, jnp.int32)
        return Factor(statistics * eyes, preconditioner * eyes, *zeros)

    return tuple(factor(n) for n in stack.sizes)


def without_statistics(factor: Factor) -> Factor:
    """Leave what changes only where a slot is due."""
    return factor._replace(statistics=None)  # type: ignore[arg-type]


def update_statistics(
    stack: Stack, factors: Factors, gradients: jax.Array, options: Options, whitened: bool = False
) -> Factors:
    """Take gradients into the statistics of each axis: L <- b2 L + (1 - b2) G G^T, and so on.

    A block whose average would not be finite, by an entry or by squares that overflow, is left out: a single one would
    poison the average for good.

    Args:
      stack: The stack.
      factors: Of each axis.
      gradients: (N, *block_shape).
      options: The settings.
      whitened: Whether the gradient is first multiplied by the preconditioners of the other axes (KL-Shampoo).

    Returns:
      The factors with new statistics.
    """
    letters = string.ascii_lowercase[: gradients.ndim - 1]
    updated = []
    for axis, factor in zip(stack.axes, factors, strict=True):
        blocks = gradients
        if whitened:
            others = [(a, f.preconditioner) for a, f in zip(stack.axes, factors, strict=True) if a != axis]
            blocks = multiply_axes(blocks, others, options)
            blocks = blocks / (blocks[0].size / blocks.shape[axis + 1]) ** 0.5
        letter = letters[axis]
        equation = f"N{letters},N{letters.replace(letter, 'Z')}->N{letter}Z"
        average = accumulate(
            factor.statistics, jnp.einsum(equation, blocks, blocks, precision=options.precision), options.b2
        )
        # The trace bounds every entry of a positive semi-definite matrix.
        finite = jnp.isfinite(jnp.trace(average, axis1=1, axis2=2))[:, None, None]
        updated.append(factor._replace(statistics=jnp.where(finite, average, factor.statistics)))
    return tuple(updated)


def multiply_axes(blocks: jax.Array, matrices: Sequence[tuple[int, jax.Array]], options: Options) -> jax.Array:
    """Multiply axes of each block by matrices.

    Args:
      blocks: (N, *block_shape).
      matrices: Axes of a block, each with its matrices (N, n, n); entry [i, j] takes j of the axis to i.
      options: The settings.

    Returns:
      (N, *block_shape); for matrices, L G R^T.
    """
    letters = string.ascii_lowercase[: blocks.ndim - 1]
    for axis, matrix in matrices:
        equation = f"NZ{letters[axis]},N{letters}->N{letters.replace(letters[axis], 'Z')}"
        blocks = jnp.einsum(equation, matrix, blocks, precision=options.precision)
    return blocks


def in_turn(
    function: Callable[[Any, Any], Any], fixed: Any, changing: Any, count: jax.Array, options: Options, device: Any
) -> Any:
    """Apply a function to the slots that are due.

    In turns, slot i is due at each step t with t - 1 = i (modulo the frequency k). The rows of the ceil(N / k) slots
    that may be due are gathered at a traced offset and scattered back, without a branch: all steps take the same time,
    and the first k compute every slot once. All at once is a single condition.

    Args:
      function: From (fixed, changing) of some slots to the new changing ones.
      fixed: For each stack a tree of arrays with N slots each.
      changing: Likewise.
      count: The number of this step, from 1.
      options: The settings.
      device: Which part of the slots these are.

    Returns:
      The new `changing`.
    """
    k = options.precondition_frequency
    is_early = (count > options.start) & (count <= options.start + k) if options.refresh_early else False
    if not options.stagger:
        is_due = is_early | ((count % k == 0) & (count >= options.start))
        return jax.lax.cond(is_due, lambda changing: function(fixed, changing), lambda changing: changing, changing)

    def rows_of(tree: Any) -> jax.Array:
        slots = len(jax.tree.leaves(tree)[0])
        return (count - 1 - device * slots) % k + k * jnp.arange(-(-slots // k))  # those beyond the last are dropped

    def take(tree: Any, rows: jax.Array) -> Any:
        return jax.tree.map(lambda x: x.at[rows].get(mode="clip", unique_indices=True, indices_are_sorted=True), tree)

    def some(changing: Any) -> Any:
        rows = [rows_of(tree) for tree in changing]
        new = function(*([take(tree, r) for tree, r in zip(trees, rows, strict=True)] for trees in (fixed, changing)))
        return [
            jax.tree.map(
                lambda x, y, r=r: x.at[r].set(y, mode="drop", unique_indices=True, indices_are_sorted=True), tree, part
            )
            for tree, part, r in zip(changing, new, rows, strict=True)
        ]

    if options.refresh_early:
        return jax.lax.cond(is_early, lambda changing: function(fixed, changing), some, changing)
    return some(changing)


def by_class(
    plan: Plan, function: Callable[..., tuple[jax.Array, jax.Array]], *stacks: Sequence[Sequence[jax.Array]]
) -> list[list[tuple[jax.Array, jax.Array]]]:
    """Apply a function to all matrices of one size and root at once.

    Args:
      plan: The plan.
      function: From matrices (M, n, n), one for each of `stacks`, and p to two results with M slots.
      *stacks: For each stack and axis an array (m, n, n).

    Returns:
      For each stack and axis its part of the two results.
    """
    results: list[list[Any]] = [[None] * len(stack.axes) for stack in plan.stacks]
    for (_, p), places in plan.classes.items():
        arguments = [jnp.concatenate([matrices[i][axis] for i, axis in places]) for matrices in stacks]
        first, second = function(*arguments, p)
        ends = list(itertools.accumulate((len(stacks[0][i][axis]) for i, axis in places), initial=0))
        for (i, axis), begin, end in zip(places, ends, ends[1:], strict=False):
            results[i][axis] = first[begin:end], second[begin:end]
    return results


def accept(old: Factor, new: jax.Array, residual: jax.Array, options: Options, counts: Any = True) -> Factor:
    """Take a new preconditioner, or keep the old one where the new is not finite or its residual above `max_residual`.

    Args:
      old: Of some slots.
      new: (m, n, n).
      residual: (m,).
      options: The settings.
      counts: Whether this step's results are taken at all.

    Returns:
      The factor, with the residual and the rejection told.
    """
    good = jnp.isfinite(new).all((1, 2)) & jnp.isfinite(residual) & (residual <= options.max_residual)
    return old._replace(
        preconditioner=jnp.where((good & counts)[:, None, None], new, old.preconditioner),
        residual=residual,
        rejections=old.rejections + (~good & counts),
    )
