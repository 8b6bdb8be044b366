"""The static plan: which parameter is cut into which blocks, and where their preconditioners live.

It is made from shapes alone. Blocks of one shape are stacked in one array (N, *block_shape), so that
statistics and preconditioning are one batched product for each axis of each block shape, however deep
the model is; the matrices of one size and one root are decomposed together.
"""

import dataclasses
import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from simplest_vit.optimizers.shampoo.options import HAS_SECOND_MOMENT, ShampooOptions, method_for, resolve_options

# How many leading axes of each leaf are stacked layers: a tree of integers or a prefix of one (such as
# 0), or a function from the parameters to it.
StackAxes = int | Any | Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A region of a leaf that is cut into equal blocks.

    Attributes:
        starts: Where the region begins on each (merged) axis.
        counts: Blocks along each axis.
        block_shape: The shape of a block.
        slot: The first of its blocks among all the blocks of that shape.
        num_blocks: Blocks in the region, over all stacked layers.
    """

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    block_shape: tuple[int, ...]
    slot: int
    num_blocks: int


@dataclasses.dataclass(frozen=True)
class Leaf:
    """How one parameter is preconditioned.

    Attributes:
        path: Its path in the tree, with '/' between the names.
        shape: Its shape.
        dtype: Its type.
        num_layers: The product of its leading stack axes; all its entries if not preconditioned.
        merged_shape: The shape of one layer after merging of dimensions.
        pieces: Its regions of equal blocks. A leaf that is not preconditioned is one of single
            entries, blocks of shape (); a leaf without entries has none.
    """

    path: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    num_layers: int
    merged_shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclasses.dataclass(frozen=True)
class Stack:
    """Blocks of one shape in one array (count, *block_shape).

    Attributes:
        block_shape: The shape of a block.
        begin: Its first block among all the blocks of that shape.
        count: Its number of blocks.
        root: p of the inverse p-th root that its preconditioners are.
    """

    block_shape: tuple[int, ...]
    begin: int
    count: int
    root: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static plan of a transformation for one tree of parameters; `print` it.

    Attributes:
        leaves: One entry for each parameter, in the order of the tree.
        stacks: The stacks of blocks. The blocks of one shape take two: as many as `shards` devices
            share evenly, and the rest.
        options: The settings it was made with.
    """

    leaves: tuple[Leaf, ...]
    stacks: tuple[Stack, ...]
    options: ShampooOptions

    @property
    def classes(self) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """(size n, root p) -> the (stack, axis) pairs whose matrices are decomposed together."""
        classes: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for index, stack in enumerate(self.stacks):
            for axis, n in enumerate(stack.block_shape):
                classes.setdefault((n, stack.root), []).append((index, axis))
        return classes

    @property
    def meanings(self) -> dict[str, str]:
        """Settings that give a state of equal arrays another meaning, and a checksum of what lies where."""
        options = self.options
        layout = repr([(leaf.path, leaf.shape, leaf.num_layers, leaf.merged_shape) for leaf in self.leaves])
        return {
            "b2": "1" if options.b2 == 1 else "below 1",
            "exponent_override": str(options.exponent_override),
            "grafting": options.grafting,
            "grafting_b2": "1" if options.grafting_b2 == 1 else "below 1",
            "layout": f"{zlib.crc32(layout.encode()):08x}",
            "relative_epsilon": str(options.relative_epsilon),
        }

    @property
    def stack_bytes(self) -> int:
        """Bytes of the statistics, the preconditioners and their two counters for each slot."""
        size = self.options.dtype.itemsize
        return sum(stack.count * (2 * n * n * size + 8) for stack in self.stacks for n in stack.block_shape)

    @property
    def state_bytes(self) -> int:
        """Bytes of the whole state of `scale_by_shampoo`, without SOAP's second moments in the bases."""
        size = self.options.dtype.itemsize
        mu_size = size if self.options.mu_dtype is None else jnp.dtype(self.options.mu_dtype).itemsize
        moments = 0
        for stack in self.stacks:
            has_moment = method_for(stack.block_shape, self.options) in HAS_SECOND_MOMENT
            moments += stack.count * math.prod(stack.block_shape) * (mu_size + has_moment * size)
        return 4 + len(self.meanings) + moments + self.stack_bytes

    @property
    def step_flops(self) -> int:
        """Floating-point operations of statistics and preconditioning in each step."""
        return sum(
            4 * stack.count * math.prod(stack.block_shape) * n for stack in self.stacks for n in stack.block_shape
        )

    @property
    def refresh_cubes(self) -> int:
        """The sum of n^3 over all matrices: what a refresh costs, up to the root's constant."""
        return sum(stack.count * n**3 for stack in self.stacks for n in stack.block_shape)

    def __str__(self) -> str:
        """A table of the parameters, the classes and the costs."""
        width = max([len(leaf.path) for leaf in self.leaves] + [9])
        lines = [f"{'parameter':{width}}  {'shape':22}  preconditioned as"]
        for leaf in self.leaves:
            lines.append(f"{leaf.path:{width}}  {leaf.shape!s:22}  {_describe(leaf)}")
        for (n, root), members in self.classes.items():
            count = sum(self.stacks[stack].count for stack, _ in members)
            lines.append(f"{count} matrices of {n} x {n}, inverse root {root}")
        parameters = sum(math.prod(leaf.shape) for leaf in self.leaves)
        lines.append(
            f"{parameters:,} parameters; state {self.state_bytes / 2**20:.1f} MiB, of which "
            f"statistics and preconditioners {self.stack_bytes / 2**20:.1f}\n"
            f"{self.step_flops / 1e9:.3g} GFLOP a step; "
            f"sum of n^3 for a refresh {self.refresh_cubes:.3g}"
        )
        return "\n".join(lines)


def shampoo_plan(params: Any, *, preset: str = "fast", stack_axes: StackAxes = 0, **given: Any) -> Plan:
    """Returns the plan that a transformation with these settings makes for these parameters.

    Args:
        params: Any pytree of arrays or `jax.ShapeDtypeStruct`s.
        preset: 'fast', 'reference' or 'soap'.
        stack_axes: As in `scale_by_shampoo`.
        **given: Fields of `ShampooOptions`.

    Returns:
        A plan: print it to see which parameter is preconditioned how and what that costs.

    Raises:
        ValueError: As `scale_by_shampoo` and its `init`.

    Examples:
        >>> import jax.numpy as jnp
        >>> print(shampoo_plan({"kernel": jnp.zeros((6, 4))}, max_preconditioner_dim=4))
        parameter  shape                   preconditioned as
        kernel     (6, 4)                  1 (4, 4) + 1 (2, 4)
        3 matrices of 4 x 4, inverse root 4
        1 matrices of 2 x 2, inverse root 4
        24 parameters; state 0.0 MiB, of which statistics and preconditioners 0.0
        7.04e-07 GFLOP a step; sum of n^3 for a refresh 200
    """
    return make_plan(params, resolve_options(preset, **given), stack_axes)


def make_plan(params: Any, options: ShampooOptions, stack_axes: StackAxes = 0) -> Plan:
    """Cuts every leaf into blocks and gives each block its slot.

    Args:
        params: Any pytree of arrays or `jax.ShapeDtypeStruct`s.
        options: The settings.
        stack_axes: The number of leading axes that stack layers, for each leaf.

    Returns:
        The plan.

    Raises:
        ValueError: For a parameter that is not a real floating-point array, or a number of stack
            axes that it does not have; the message names its path.
    """
    taken: dict[tuple[int, ...], int] = {}  # block shape -> blocks so far
    axes = stack_axes(params) if callable(stack_axes) else stack_axes
    axes = jax.tree.leaves(jax.tree.broadcast(axes, params))
    leaves = tuple(
        _make_leaf(path_name(path), leaf, options, leaf_axes, taken)
        for (path, leaf), leaf_axes in zip(jax.tree_util.tree_leaves_with_path(params), axes, strict=True)
    )
    stacks = []
    for shape, total in taken.items():
        root = options.exponent_override or 2 * len(shape)
        even = total - total % options.shards if shape else 0  # single entries are not worth spreading
        for begin, count in ((0, even), (even, total - even)):
            if count:
                stacks.append(Stack(shape, begin, count, root))
    return Plan(leaves, tuple(stacks), options)


def path_name(path: Sequence[Any]) -> str:
    """Returns a key path as names with '/' between them, such as 'blocks/mlp/kernel'."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def merge_small_dims(shape: Sequence[int], max_dim: int) -> tuple[int, ...]:
    """Merges each dimension into the one before it while their product stays within `max_dim`.

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


def _make_leaf(
    path: str,
    leaf: Any,
    options: ShampooOptions,
    axes: int,
    taken: dict[tuple[int, ...], int],
) -> Leaf:
    shape, dtype = tuple(jnp.shape(leaf)), jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{path}: its dtype is {dtype}: it must be a real floating-point type.")
    if not 0 <= axes <= len(shape):
        raise ValueError(f"{path}: stack_axes={axes}: it must be in 0..{len(shape)} (its rank).")
    num_layers, merged = math.prod(shape[:axes]), shape[axes:]
    # The rank before merging counts: a small matrix that merges into a vector stays preconditioned.
    order = len(merged)
    if order and options.merge_dims:
        merged = merge_small_dims(merged, options.max_preconditioner_dim)
    if order < 2 and not (order and options.precondition_1d):
        num_layers, merged = math.prod(shape), ()
    pieces: list[Piece] = []
    cuts = [_cut(dim, options.max_preconditioner_dim) for dim in merged] if math.prod(shape) else [[]]
    for region in itertools.product(*cuts):
        starts, counts, block_shape = zip(*region, strict=True) if region else ((), (), ())
        num_blocks = num_layers * math.prod(counts)
        slot = taken.get(block_shape, 0)
        taken[block_shape] = slot + num_blocks
        pieces.append(Piece(starts, counts, block_shape, slot, num_blocks))
    return Leaf(path, shape, dtype, num_layers, merged, tuple(pieces))


def _cut(dim: int, size: int) -> list[tuple[int, int, int]]:
    """Returns (start, number of blocks, block size): the whole blocks, then a smaller last one."""
    whole = dim // size
    regions = [(0, whole, size)] if whole else []
    return regions + ([(whole * size, 1, dim % size)] if dim % size else [])


def _describe(leaf: Leaf) -> str:
    if not leaf.merged_shape:
        return "- (the grafting method's own step)"
    return " + ".join(f"{piece.num_blocks} {piece.block_shape}" for piece in leaf.pieces)
