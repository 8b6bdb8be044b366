"""The static plan: the division of parameters into blocks, and its cost.

The plan depends on shapes alone. Blocks of one shape are stacked in one array (N, *block_shape), so that statistics and
preconditioning are one batched product per axis of each block shape, however deep the model is. Matrices of the same
size and root are decomposed together. With `max_preconditioner_dim=384`:

    (48, 64)                      -> one block                  -> 1 slot of a stack (N, 48, 64)
    (384, 1536)                   -> 4 blocks (384, 384)        -> 4 slots of (N, 384, 384)
    (12, 384, 1536), stack_axes=1 -> 12 layers of 4 blocks      -> 48 slots of (N, 384, 384)
    (1000, 4)                     -> even: 3 of (334, 4), else 3 of (384, 4); the last one is padded with zeros
    (50257, 768)                  -> 2 blocks (50257, 384), of which only the short axis has a preconditioner
    (384,)                        -> no block: updated by the diagonal method
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .options import AnyOptions, ShampooOptions, SoapOptions

# The number of leading axes of each parameter that stack layers: a tree of integers or a prefix of one, a function from
# the parameters to it, or None for no such axes.
StackAxes = int | Any | Callable[[Any], Any]

# Staggering recomputes at least one block of each shape per step. It is disabled if that takes more than this many
# times the work of recomputing all blocks together, as for few blocks of many shapes.
_MOST_STAGGERED = 2.0


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The equal blocks of a parameter; the last ones along an axis are padded with zeros, which change nothing."""

    counts: tuple[int, ...]  # along each (merged) axis
    block_shape: tuple[int, ...]
    stack: int  # index of the stack that holds them
    slot: int  # of the first block in the stack
    num_blocks: int  # over all stacked layers


@dataclasses.dataclass(frozen=True)
class ParamPlan:
    """The preconditioning of one parameter."""

    path: str  # its path in the tree, such as 'blocks/mlp/kernel', for messages
    shape: tuple[int, ...]
    dtype: jnp.dtype
    num_layers: int  # product of its leading stack axes
    merged_shape: tuple[int, ...]  # of one layer, after small dimensions are merged
    blocks: Blocks | None  # None if it is not preconditioned


@dataclasses.dataclass(frozen=True)
class BlockStack:
    """Blocks of one shape in one array (count, *block_shape)."""

    block_shape: tuple[int, ...]
    axes: tuple[int, ...]  # those that have a preconditioner
    count: int
    root: int  # the p of the inverse p-th roots that are their preconditioners

    @property
    def sizes(self) -> list[int]:
        """The size n of the matrices of each preconditioned axis."""
        return [self.block_shape[axis] for axis in self.axes]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static plan of a transformation for one tree of parameters; `print` it."""

    params: tuple[ParamPlan, ...]  # one entry for each parameter, in the order of the tree
    stacks: tuple[BlockStack, ...]
    options: AnyOptions  # the arguments it was made with

    @property
    def sizes(self) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """Map (n, p) to the (stack, axis) pairs whose n x n matrices have inverse p-th roots, decomposed together."""
        sizes: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for index, stack in enumerate(self.stacks):
            for axis, n in enumerate(stack.sizes):
                sizes.setdefault((n, stack.root), []).append((index, axis))
        return sizes

    @property
    def stack_bytes(self) -> int:
        """Bytes of the statistics, the preconditioners, and the error and rejections of each slot."""
        size = self.options.dtype.itemsize
        return sum(stack.count * (2 * n * n * size + 8) for stack in self.stacks for n in stack.sizes)

    @property
    def state_bytes(self) -> int:
        """Bytes of the whole state (`stack_bytes`, moments and count), without the few bytes of its version."""
        options = self.options
        size, mu_size = options.dtype.itemsize, options.momentum_dtype.itemsize
        cut = sum(stack.count * math.prod(stack.block_shape) for stack in self.stacks)
        whole = sum(math.prod(param.shape) for param in self.params if not param.blocks)
        moments = cut * (mu_size + size * options.diagonal(True).has_second_moment)
        moments += whole * (mu_size + size * options.diagonal(False).has_second_moment)
        return 4 + moments + self.stack_bytes

    @property
    def step_flops(self) -> int:
        """Floating-point operations of statistics and preconditioning in each step.

        For each axis, one product computes statistics and one preconditions. SOAP rotates gradients to its basis and
        back. KL-Shampoo multiplies them by an axis's preconditioner for the statistics of each other axis.
        """

        def products(stack: BlockStack) -> int:
            if isinstance(self.options, ShampooOptions):
                return 2 + (len(stack.axes) - 1 if self.options.statistics == "kl" else 0)
            return 3

        return sum(2 * products(s) * s.count * math.prod(s.block_shape) * n for s in self.stacks for n in s.sizes)

    @property
    def refresh_cubes(self) -> int:
        """The sum of n^3 over all matrices: the cost of refreshing all, up to the method's constant."""
        return sum(stack.count * n**3 for stack in self.stacks for n in stack.sizes)

    @property
    def _staggered_cubes(self) -> int:
        k = self.options.precondition_frequency
        return sum(math.ceil(stack.count / k) * n**3 for stack in self.stacks for n in stack.sizes)

    @property
    def is_staggered(self) -> bool:
        """True if recomputation is staggered; False if recomputing all blocks together costs less than half as much.

        It depends on shapes alone, not on devices, so that a run takes the same steps on any number of devices.
        """
        most = _MOST_STAGGERED * self.refresh_cubes / self.options.precondition_frequency
        return self.options.stagger and self._staggered_cubes <= most

    @property
    def step_cubes(self) -> int:
        """The sum of n^3 over the matrices recomputed in a step; the average over steps if not staggered."""
        return self._staggered_cubes if self.is_staggered else self.refresh_cubes // self.options.precondition_frequency

    def __str__(self) -> str:
        """Format a table of parameters, matrices and costs."""
        width = max([len(param.path) for param in self.params] + [9])
        lines = [f"{'parameter':{width}}  {'shape':22}  preconditioned as"]
        for param in self.params:
            cut = param.blocks
            how = f"{cut.num_blocks} {cut.block_shape}" if cut else "- (the diagonal method)"
            lines.append(f"{param.path:{width}}  {param.shape!s:22}  {how}")
        for (n, root), places in self.sizes.items():
            count = sum(self.stacks[index].count for index, _ in places)
            what = "eigenbasis" if isinstance(self.options, SoapOptions) else f"inverse root {root}"
            lines.append(f"{count} matrices of {n} x {n}, {what}")
        parameters = sum(math.prod(param.shape) for param in self.params)
        lines.append(
            f"{parameters:,} parameters; state {self.state_bytes / 2**20:.1f} MiB, of which "
            f"statistics and preconditioners {self.stack_bytes / 2**20:.1f}\n"
            f"{self.step_flops / 1e9:.3g} GFLOP a step; sum of n^3 for a refresh {self.refresh_cubes:.3g}, "
            f"in a step {self.step_cubes:.3g} ({'staggered' if self.is_staggered else 'all together'})"
        )
        return "\n".join(lines)


def make_plan(params: Any, options: AnyOptions) -> Plan:
    """Cut every parameter into blocks and assign a slot to each block.

    Args:
      params: Any pytree of arrays or `jax.ShapeDtypeStruct`s.
      options: The arguments.

    Raises:
      ValueError: For a parameter that is not a real floating-point array, or whose rank is less than its stack axes;
        the message names its path.
    """
    axes = options.stack_axes(params) if callable(options.stack_axes) else options.stack_axes
    axes = jax.tree.leaves(jax.tree.broadcast(0 if axes is None else axes, params))
    stacks: dict[tuple[Any, Any], int] = {}  # (block shape, preconditioned axes) -> number of the stack
    taken: list[int] = []  # blocks of each stack so far
    plans = []
    for (keys, leaf), leaf_axes in zip(jax.tree_util.tree_leaves_with_path(params), axes, strict=True):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        shape, dtype = tuple(jnp.shape(leaf)), jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"{path}: its dtype is {dtype}: it must be a real floating-point type.")
        if not isinstance(leaf_axes, int) or not 0 <= leaf_axes <= len(shape):
            raise ValueError(f"{path}: stack_axes={leaf_axes}: it must be in 0..{len(shape)} (its rank).")
        layers, merged = math.prod(shape[:leaf_axes]), _merged_shape(shape[leaf_axes:], options)
        long = _preconditioned_axes(merged, options)
        blocks = None
        if long and 0 not in shape:
            counts, block_shape = zip(*(_cut(dim, options) for dim in merged), strict=True)
            stack = stacks.setdefault((block_shape, long), len(stacks))
            taken += [0] * (len(stacks) - len(taken))
            blocks = Blocks(counts, block_shape, stack, taken[stack], layers * math.prod(counts))
            taken[stack] += blocks.num_blocks
        plans.append(ParamPlan(path, shape, dtype, layers, merged, blocks))
    made = (BlockStack(*key, count, _root(len(key[1]), options)) for key, count in zip(stacks, taken, strict=True))
    return Plan(tuple(plans), tuple(made), options)


def merge_small_dims(shape: Sequence[int], max_dim: int) -> tuple[int, ...]:
    """Merge each dimension into the one before it while their product stays within `max_dim`.

    A dimension of 1 is always merged. (48, 3, 4, 4) with 8192 gives (2304,), with 512 (144, 16).
    """
    merged = [shape[0]]
    for dim in shape[1:]:
        if merged[-1] == 1 or dim == 1 or merged[-1] * dim <= max_dim:
            merged[-1] *= dim
        else:
            merged.append(dim)
    return tuple(merged)


def _merged_shape(shape: tuple[int, ...], options: AnyOptions) -> tuple[int, ...]:
    """Merge the dimensions of one layer; () if it is not to be preconditioned."""
    # The rank before merging decides: a small matrix that merges into a vector is still preconditioned.
    if len(shape) < 2 and not (shape and options.precondition_1d):
        return ()
    return merge_small_dims(shape, options.max_preconditioner_dim) if options.merge_dims else shape


def _preconditioned_axes(shape: tuple[int, ...], options: AnyOptions) -> tuple[int, ...]:
    """Choose the axes with a preconditioner by the shape of the parameter; all its blocks have the same axes."""
    axes = [axis for axis, dim in enumerate(shape) if dim <= options.ignored_dim]
    # An axis of size 1 has no direction to scale, and would change the root.
    axes = [axis for axis in axes if shape[axis] > 1] or axes
    return tuple([min(axes, key=lambda axis: shape[axis])] if options.one_sided and axes else axes)


def _cut(dim: int, options: AnyOptions) -> tuple[int, int]:
    """Cut a dimension: return the number of blocks, and their size."""
    if dim > options.ignored_dim:
        return 1, dim
    size = min(dim, options.max_preconditioner_dim)
    if options.even_blocks:  # the fewest blocks, as even as possible
        size = math.ceil(dim / math.ceil(dim / size))
    return math.ceil(dim / size), size


def _root(order: int, options: AnyOptions) -> int:
    if not isinstance(options, ShampooOptions):
        return 1
    return options.exponent_override or (2 if options.statistics == "kl" else 2 * order)
