"""The preconditioned axes of stacked blocks: their statistics, preconditioners and refreshes."""

import itertools
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .moments import accumulate
from .options import AnyOptions
from .plan import BlockStack, Plan


class AxisState(NamedTuple):
    """The state of one axis of one stack of blocks: a slot for each block."""

    statistics: jax.Array  # (N, n, n), the average of G G^T over this axis, without bias correction
    preconditioner: jax.Array  # (N, n, n), the inverse root (Shampoo) or the eigenbasis (SOAP)
    error: jax.Array  # (N,) float32, error of the last preconditioner computed
    rejections: jax.Array  # (N,) int32, number of preconditioners rejected


Axes = tuple[AxisState, ...]  # by preconditioned axis


def init_axes(stack: BlockStack, options: AnyOptions) -> Axes:
    """Make the state of a stack's axes before the first gradient: multiples of the identity."""

    def axis(n: int) -> AxisState:
        eyes = jnp.broadcast_to(jnp.eye(n, dtype=options.dtype), (stack.count, n, n))
        zeros = jnp.zeros(stack.count, jnp.float32), jnp.zeros(stack.count, jnp.int32)
        return AxisState(options.first_statistics * eyes, eyes, *zeros)

    return tuple(axis(n) for n in stack.sizes)


def update_statistics(stack: BlockStack, axes: Axes, blocks: jax.Array, finite: jax.Array, options: AnyOptions) -> Axes:
    """Update the statistics of each axis with gradients: L <- b L + (1 - b) G G^T, and so on; b = 1 sums.

    With KL-Shampoo G is first multiplied by the preconditioners of the other axes.

    Args:
      blocks: G (N, *block_shape), finite.
      finite: Bool (N,). Blocks where it is False, or whose average would overflow, leave their statistics unchanged,
        because a single bad value would never leave the average.
    """
    precision = options.matmul_precision
    letters = string.ascii_lowercase[: blocks.ndim - 1]
    updated = []
    for axis, state in zip(stack.axes, axes, strict=True):
        g = blocks
        if options.whitened:
            others = [(a, s.preconditioner) for a, s in zip(stack.axes, axes, strict=True) if a != axis]
            g = multiply_axes(g, others, precision)
            g = g / (g[0].size / g.shape[axis + 1]) ** 0.5
        letter = letters[axis]
        equation = f"N{letters},N{letters.replace(letter, 'Z')}->N{letter}Z"
        average = accumulate(
            state.statistics, jnp.einsum(equation, g, g, precision=precision), options.statistics_decay
        )
        # The trace bounds every entry of a positive semi-definite matrix.
        kept = (finite & jnp.isfinite(jnp.trace(average, axis1=1, axis2=2)))[:, None, None]
        updated.append(state._replace(statistics=jnp.where(kept, average, state.statistics)))
    return tuple(updated)


def multiply_axes(
    blocks: jax.Array, matrices: Sequence[tuple[int, jax.Array]], precision: str | None = None
) -> jax.Array:
    """Multiply axes of blocks (N, *block_shape) by matrices (N, n, n), whose entry [i, j] takes j of the axis to i.

    For blocks G that are matrices, with L for axis 0 and R for axis 1: L G R^T.
    """
    letters = string.ascii_lowercase[: blocks.ndim - 1]
    for axis, matrix in matrices:
        equation = f"NZ{letters[axis]},N{letters}->N{letters.replace(letters[axis], 'Z')}"
        blocks = jnp.einsum(equation, matrix, blocks, precision=precision)
    return blocks


def map_by_size(
    plan: Plan, function: Callable[..., tuple[jax.Array, jax.Array]], *stacks: Sequence[Sequence[jax.Array]]
) -> list[list[tuple[jax.Array, jax.Array]]]:
    """Apply a function to all matrices of one size and root together.

    It takes matrices (M, n, n), one argument for each of `stacks`, and p, and returns two results with M slots. Each of
    `stacks` has an array (m, n, n) for each stack and axis; each gets its part of the two results.
    """
    results: list[list[Any]] = [[None] * len(stack.axes) for stack in plan.stacks]
    for (_, p), places in plan.sizes.items():
        arguments = [jnp.concatenate([matrices[i][axis] for i, axis in places]) for matrices in stacks]
        first, second = function(*arguments, p)
        ends = list(itertools.accumulate((len(stacks[0][i][axis]) for i, axis in places), initial=0))
        for (i, axis), begin, end in zip(places, ends, ends[1:], strict=False):
            results[i][axis] = first[begin:end], second[begin:end]
    return results


def update_if_valid(
    old: AxisState, new: jax.Array, error: jax.Array, most: float, counts: jax.typing.ArrayLike = True
) -> AxisState:
    """Take new preconditioners (m, n, n), except those that are not finite or have an error (m,) above `most`.

    The state records the error and counts the rejection; if `counts` is False, this step's results are ignored.
    """
    good = jnp.isfinite(new).all((1, 2)) & jnp.isfinite(error) & (error <= most)
    return old._replace(
        preconditioner=jnp.where((good & counts)[:, None, None], new, old.preconditioner),
        error=error,
        rejections=old.rejections + (~good & counts).astype(jnp.int32),
    )


def refresh_together(refresh: Callable[[Any], Any], stacks: Any, is_due: jax.Array) -> Any:
    """Refresh all slots if they are due; see `refresh_staggered` for the arguments."""
    return jax.lax.cond(is_due, refresh, lambda stacks: stacks, _vary_alike(stacks))


def refresh_staggered(
    refresh: Callable[[Any], Any], stacks: Any, phase: jax.Array, phases: jax.Array | int, k: int, device: Any
) -> Any:
    """Refresh the slots i with i = phase (modulo k), and those of the next phases if there is more than one.

    The rows of the ceil(N / k) slots that may be due are gathered at a traced offset and scattered back, without a
    branch, so that all steps take the same time. A traced number of phases makes a loop, whose length the host of a GPU
    has to read.

    Args:
      refresh: Function from some slots of all stacks to the same with new arrays; what it returns as it was is not
        written.
      stacks: A tree for each stack, of arrays with N slots.
      phase: int32, from 0.
      phases: Number of phases that are due: 1, or a traced number up to k.
      k: The period in steps.
      device: Number of the device, which holds this part of the slots.
    """

    def rows_of(tree: Any, phase: jax.Array) -> jax.Array:
        slots = len(jax.tree.leaves(tree)[0])
        return (phase - device * slots) % k + k * jnp.arange(-(-slots // k))  # rows beyond the last are dropped

    def take(tree: Any, rows: jax.Array) -> Any:
        return jax.tree.map(lambda x: x.at[rows].get(mode="clip", unique_indices=True, indices_are_sorted=True), tree)

    def put(tree: Any, rows: jax.Array, old: Any, new: Any) -> Any:
        def write(x: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
            at = x.at[rows]
            return x if new is old else at.set(new, mode="drop", unique_indices=True, indices_are_sorted=True)

        return jax.tree.map(write, tree, old, new)

    def refresh_phase(offset: jax.Array | int, stacks: Any) -> Any:
        rows = [rows_of(tree, phase + offset) for tree in stacks]
        old = [take(*pair) for pair in zip(stacks, rows, strict=True)]
        return [put(*row) for row in zip(stacks, rows, old, refresh(old), strict=True)]

    if isinstance(phases, int):
        return refresh_phase(0, stacks)
    return jax.lax.fori_loop(0, phases, refresh_phase, _vary_alike(stacks))


def shampoo_metrics(opt_state: Any) -> dict[str, jax.Array]:
    """Find Shampoo or SOAP anywhere in an optimizer state and compute metrics of its preconditioners.

    Call it within the jitted training step: it reduces arrays and never reads their values.

    Args:
      opt_state: Any optax state, however nested.

    Returns:
      `rejected_roots`: int32, number of preconditioners rejected so far; `worst_residual`: float32, the largest error
      over the slots of the last preconditioner computed, rejected or not. Empty if the state holds neither Shampoo
      nor SOAP.
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, AxisState))
    axes = [leaf for leaf in leaves if isinstance(leaf, AxisState)]
    if not axes:
        return {}
    return {
        "rejected_roots": sum((jnp.sum(axis.rejections) for axis in axes), jnp.zeros((), jnp.int32)),
        "worst_residual": jnp.max(jnp.stack([jnp.max(axis.error) for axis in axes])),
    }


def _vary_alike(tree: Any) -> Any:
    """Mark arrays as varying over the same devices, as branches and loops within `jax.shard_map` need."""

    def axes_of(x: jax.Array) -> set[str]:
        kind: Any = jax.typeof(x)
        return set(kind.vma if hasattr(kind, "vma") else kind.mat.varying)  # JAX 0.10 has the latter

    over = set().union(*map(axes_of, jax.tree.leaves(tree)))

    def vary(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(over - axes_of(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree)
