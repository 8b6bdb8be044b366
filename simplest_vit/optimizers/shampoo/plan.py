"""The static plan: which parameter is cut into which blocks, and what that costs.

It is made from shapes alone. Blocks of one shape are stacked in one array (N, *block_shape), so that statistics and
preconditioning are one batched product for each axis of each block shape, however deep the model is; the matrices of
one size and one root are decomposed together.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .options import Options, ShampooOptions, SoapOptions, resolve_options

# How many leading axes of each leaf are stacked layers: a tree of integers or a prefix of one, a function from the
# parameters to it, or None for no such axes.
StackAxes = int | Any | Callable[[Any], Any]

VERSION = 2  # of the layout of the state


@dataclasses.dataclass(frozen=True)
class Piece:
    """A region of a leaf that is cut into equal blocks.

    Attributes:
      starts: Where the region begins on each (merged) axis.
      counts: Blocks along each axis.
      block_shape: The shape of a block.
      stack: The number of the stack that holds them.
      slot: The first of them in the stack.
      num_blocks: Blocks in the region, over all stacked layers.
    """

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    block_shape: tuple[int, ...]
    stack: int
    slot: int
    num_blocks: int


@dataclasses.dataclass(frozen=True)
class Leaf:
    """How one parameter is preconditioned.

    Attributes:
      keys: Its key path in the tree, which tells it from the others.
      shape: Its shape.
      dtype: Its type.
      num_layers: The product of its leading stack axes.
      merged_shape: The shape of one layer after merging of dimensions; () for numbers, and vectors that are not
        preconditioned.
      pieces: Its regions of equal blocks; none where it is not preconditioned.
    """

    keys: tuple[Any, ...]
    shape: tuple[int, ...]
    dtype: jnp.dtype
    num_layers: int
    merged_shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def path(self) -> str:
        """Its names with '/' between them, such as 'blocks/mlp/kernel', for messages."""
        return path_name(self.keys)


@dataclasses.dataclass(frozen=True)
class Stack:
    """Blocks of one shape in one array (count, *block_shape).

    Attributes:
      block_shape: The shape of a block.
      axes: The axes that have a preconditioner: those longer than 1, unless there are none.
      count: The number of blocks.
      root: p of the inverse p-th root that their preconditioners are.
    """

    block_shape: tuple[int, ...]
    axes: tuple[int, ...]
    count: int
    root: int

    @property
    def sizes(self) -> list[int]:
        """The size n of the matrices of each preconditioned axis."""
        return [self.block_shape[axis] for axis in self.axes]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static plan of a transformation for one tree of parameters; `print` it.

    Attributes:
      leaves: One entry for each parameter, in the order of the tree.
      stacks: The stacks of blocks.
      options: The settings it was made with.
    """

    leaves: tuple[Leaf, ...]
    stacks: tuple[Stack, ...]
    options: Options

    @property
    def classes(self) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """(size n, root p) -> where such matrices are: the number of the stack, and of the axis among its `axes`."""
        classes: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for index, stack in enumerate(self.stacks):
            for axis, n in enumerate(stack.sizes):
                classes.setdefault((n, stack.root), []).append((index, axis))
        return classes

    @property
    def stack_bytes(self) -> int:
        """Bytes of the statistics, the preconditioners, and their residual and rejections for each slot."""
        size = self.options.dtype.itemsize
        return sum(stack.count * (2 * n * n * size + 8) for stack in self.stacks for n in stack.sizes)

    @property
    def state_bytes(self) -> int:
        """Bytes of the whole state: `stack_bytes`, momentum and second moment of each entry, count and version."""
        options = self.options
        size, mu_size = options.dtype.itemsize, options.momentum_dtype.itemsize
        cut = sum(stack.count * math.prod(stack.block_shape) for stack in self.stacks)
        whole = sum(math.prod(leaf.shape) for leaf in self.leaves if not leaf.pieces)
        moments = cut * (mu_size + size * options.diagonal(True).has_second_moment)
        moments += whole * (mu_size + size * options.diagonal(False).has_second_moment)
        return 4 + VERSION + moments + self.stack_bytes

    @property
    def step_flops(self) -> int:
        """Floating-point operations of statistics and preconditioning in each step.

        For each axis one product makes statistics and one preconditions; SOAP rotates gradients to its basis and back;
        KL-Shampoo multiplies them by an axis's preconditioner for the statistics of each other axis.
        """

        def products(stack: Stack) -> int:
            if isinstance(self.options, ShampooOptions):
                return 2 + (len(stack.axes) - 1 if self.options.statistics == "kl" else 0)
            return 3

        return sum(2 * products(s) * s.count * math.prod(s.block_shape) * n for s in self.stacks for n in s.sizes)

    @property
    def refresh_cubes(self) -> int:
        """The sum of n^3 over all matrices: what a refresh of all costs, up to the method's constant."""
        return sum(stack.count * n**3 for stack in self.stacks for n in stack.sizes)

    @property
    def turn_cubes(self) -> int:
        """The sum of n^3 over the matrices that are recomputed in a step; on average, where all are at once."""
        k = self.options.precondition_frequency
        if not self.options.stagger:
            return self.refresh_cubes // k
        return sum(math.ceil(stack.count / k) * n**3 for stack in self.stacks for n in stack.sizes)

    def __str__(self) -> str:
        """A table of the parameters, the classes and the costs."""
        width = max([len(leaf.path) for leaf in self.leaves] + [9])
        lines = [f"{'parameter':{width}}  {'shape':22}  preconditioned as"]
        for leaf in self.leaves:
            blocks = " + ".join(f"{piece.num_blocks} {piece.block_shape}" for piece in leaf.pieces)
            lines.append(f"{leaf.path:{width}}  {leaf.shape!s:22}  {blocks or '- (the diagonal method)'}")
        for (n, root), places in self.classes.items():
            count = sum(self.stacks[index].count for index, _ in places)
            what = "eigenbasis" if isinstance(self.options, SoapOptions) else f"inverse root {root}"
            lines.append(f"{count} matrices of {n} x {n}, {what}")
        parameters = sum(math.prod(leaf.shape) for leaf in self.leaves)
        lines.append(
            f"{parameters:,} parameters; state {self.state_bytes / 2**20:.1f} MiB, of which "
            f"statistics and preconditioners {self.stack_bytes / 2**20:.1f}\n"
            f"{self.step_flops / 1e9:.3g} GFLOP a step; sum of n^3 for a refresh {self.refresh_cubes:.3g}, "
            f"in a step {self.turn_cubes:.3g}"
        )
        return "\n".join(lines)


def shampoo_plan(params: Any, *, preset: str = "fast", stack_axes: StackAxes = None, **settings: Any) -> Plan:
    """Make the plan that a transformation with these settings makes for these parameters.

    Args:
      params: Any pytree of arrays or `jax.ShapeDtypeStruct`s.
      preset: 'fast', 'reference' or 'soap'.
      stack_axes: As in `scale_by_shampoo`.
      **settings: Fields of `ShampooOptions` or `SoapOptions`.

    Returns:
      A plan: print it to see which parameter is preconditioned how and what that costs.

    Raises:
      ValueError: As `shampoo` and its `init`.

    Examples:
      >>> import jax.numpy as jnp
      >>> print(shampoo_plan({"kernel": jnp.zeros((7, 4))}, max_preconditioner_dim=4))
      parameter  shape                   preconditioned as
      kernel     (7, 4)                  1 (4, 4) + 1 (3, 4)
      3 matrices of 4 x 4, inverse root 4
      1 matrices of 3 x 3, inverse root 4
      28 parameters; state 0.0 MiB, of which statistics and preconditioners 0.0
      8.48e-07 GFLOP a step; sum of n^3 for a refresh 219, in a step 219
    """
    return make_plan(params, resolve_options(preset, **settings), stack_axes)


def make_plan(params: Any, options: Options, stack_axes: StackAxes = None) -> Plan:
    """Cut every leaf into blocks and give each block its slot.

    Args:
      params: Any pytree of arrays or `jax.ShapeDtypeStruct`s.
      options: The settings.
      stack_axes: The number of leading axes that stack layers, for each leaf.

    Returns:
      The plan.

    Raises:
      ValueError: For a parameter that is not a real floating-point array, or a number of stack axes that it does not
        have; the message names its path.
    """
    axes = stack_axes(params) if callable(stack_axes) else stack_axes
    axes = jax.tree.leaves(jax.tree.broadcast(0 if axes is None else axes, params))
    kinds: dict[tuple[int, ...], int] = {}  # block shape -> number of the stack
    taken: list[int] = []  # blocks of each stack so far
    leaves = []
    for (path, leaf), leaf_axes in zip(jax.tree_util.tree_leaves_with_path(params), axes, strict=True):
        shape, dtype = tuple(jnp.shape(leaf)), jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"{path_name(path)}: its dtype is {dtype}: it must be a real floating-point type.")
        if not 0 <= leaf_axes <= len(shape):
            raise ValueError(f"{path_name(path)}: stack_axes={leaf_axes}: it must be in 0..{len(shape)} (its rank).")
        layers, merged = math.prod(shape[:leaf_axes]), _merged_shape(shape[leaf_axes:], options)
        pieces = []
        for region in itertools.product(*(_cut(dim, options) for dim in merged)):
            starts, counts, block_shape = zip(*region, strict=True) if region else ((), (), ())
            if not _preconditioned_axes(block_shape, options) or not math.prod(shape):
                continue
            stack = kinds.setdefault(block_shape, len(kinds))
            taken += [0] * (len(kinds) - len(taken))
            num_blocks = layers * math.prod(counts)
            pieces.append(Piece(starts, counts, block_shape, stack, taken[stack], num_blocks))
            taken[stack] += num_blocks
        leaves.append(Leaf(tuple(path), shape, dtype, layers, merged, tuple(pieces)))
    stacks = (_stack(block_shape, count, options) for block_shape, count in zip(kinds, taken, strict=True))
    return Plan(tuple(leaves), tuple(stacks), options)


def path_name(path: Sequence[Any]) -> str:
    """Join a key path to names with '/' between them, such as 'blocks/mlp/kernel'."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def merge_small_dims(shape: Sequence[int], max_dim: int) -> tuple[int, ...]:
    """Merge each dimension into the one before it while their product stays within `max_dim`.

    Args:
      shape: At least one dimension.
      max_dim: The largest merged dimension. A dimension of 1 merges whatever the product is.

    Returns:
      The merged shape: (48, 3, 4, 4) with 8192 gives (2304,), with 512 gives (144, 16).
    """
    merged = [shape[0]]
    for dim in shape[1:]:
        if merged[-1] == 1 or dim == 1 or merged[-1] * dim <= max_dim:
            merged[-1] *= dim
        else:
            merged.append(dim)
    return tuple(merged)


def _merged_shape(shape: tuple[int, ...], options: Options) -> tuple[int, ...]:
    """Merge the dimensions of one layer; () where it is not to be preconditioned."""
    # The rank before merging counts: a small matrix that merges into a vector stays preconditioned.
    if len(shape) < 2 and not (shape and options.precondition_1d):
        return ()
    return merge_small_dims(shape, options.max_preconditioner_dim) if options.merge_dims else shape


def _preconditioned_axes(shape: tuple[int, ...], options: Options) -> tuple[int, ...]:
    axes = [axis for axis, dim in enumerate(shape) if not _is_ignored(dim, options)]
    axes = [axis for axis in axes if shape[axis] > 1] or axes  # one number is no direction, and would change the root
    return tuple([min(axes, key=lambda axis: shape[axis])] if options.one_sided and axes else axes)


def _is_ignored(dim: int, options: Options) -> bool:
    return options.ignored_dim is not None and dim > options.ignored_dim


def _cut(dim: int, options: Options) -> list[tuple[int, int, int]]:
    """Cut evenly: (start, number of blocks, block size) of the equal blocks and of a last one that may be shorter."""
    if not dim or _is_ignored(dim, options):
        return [(0, 1, dim)]
    size = math.ceil(dim / math.ceil(dim / options.max_preconditioner_dim))
    whole, rest = divmod(dim, size)
    return [(0, whole, size)] + ([(whole * size, 1, rest)] if rest else [])


def _stack(block_shape: tuple[int, ...], count: int, options: Options) -> Stack:
    axes = _preconditioned_axes(block_shape, options)
    return Stack(block_shape, axes, count, _root(len(axes), options))


def _root(order: int, options: Options) -> int:
    if not isinstance(options, ShampooOptions):
        return 1
    return options.exponent_override or (2 if options.statistics == "kl" else 2 * order)
