"""Functions that spread the slots of stacks over the devices of a mesh.

The state does not depend on the devices: its arrays have one slot for each block. In a step they are padded for the
current devices; each device updates the statistics, computes the preconditioners and preconditions the blocks of its
own slots, without communication. Gradients and updates are exchanged as parts of blocks (all-to-all), so that sharded
parameters (FSDP) stay sharded: no device needs a whole gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .plan import Plan

try:
    from jax.experimental.shard_alike import shard_alike
except ImportError:  # JAX 0.11
    shard_alike = None  # type: ignore[assignment]


def slots_spec(shape: tuple[int, ...], mesh: Any) -> P:
    """Lay out an array of slots (N, ...) over all devices along its first axis that they divide; whole if none."""
    axes = [axis for axis, size in enumerate(shape) if size and size % mesh.size == 0]
    return _over(axes[0], mesh) if axes else P()


def shard_state(stacks: Any, mesh: Mesh | None) -> Any:
    """Lay out arrays of slots as `slots_spec` says."""
    if mesh is None:
        return stacks
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, slots_spec(x.shape, mesh))), stacks)


def as_auto(mesh: Mesh | None) -> Mesh | None:
    """Return the mesh with all axes Auto, the only kind inside `in_auto_axes`."""
    if mesh is None:
        return None
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def in_auto_axes(function: Callable[..., Any], updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """Call a function of updates, state and parameters; the compiler chooses the layouts in between.

    Arrays on a mesh with Explicit axes carry their layout in their types; new updates and state keep the layouts.
    """
    layouts = jax.tree.map(lambda x: jax.typeof(x).sharding, (updates, state))
    axes = {name for layout in jax.tree.leaves(layouts) for name in layout.mesh.explicit_axes}
    if not axes:
        return function(updates, state, params)
    with_layouts = jax.sharding.auto_axes(function, axes=tuple(sorted(axes)), out_sharding=layouts)
    return with_layouts(updates, state, params)


def match_sharding(leaves: Sequence[jax.Array], params: Any, mesh: Mesh | None, count: jax.Array) -> list[jax.Array]:
    """Lay out leaves as the parameters, so that the exchange of blocks does not affect the layout of the model.

    JAX 0.11 has no `shard_alike`. There, an elementwise selection by the step count, which is never negative, transfers
    the layout of split parameters. For whole parameters, the split blocks of their updates prevail.
    """
    if mesh is None or params is None:
        return list(leaves)
    both = zip(leaves, jax.tree.leaves(params), strict=True)
    if shard_alike is not None:
        return [shard_alike(x, param)[0] for x, param in both]
    return [jnp.where(count < 0, param.astype(x.dtype), x) for x, param in both]


def split_blocks(blocks: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Split blocks (layers, k1, b1, k2, b2, ...) along one of their own axes.

    This layout is between a parameter's and that of the slots: one all-to-all leads to either.
    """
    return _split(blocks, range(2, blocks.ndim, 2), mesh)


def shard_over_devices(function: Callable[..., Any], plan: Plan, mesh: Mesh | None) -> Callable[..., Any]:
    """Run a function of slots on each device's own slots; without a mesh, on all.

    It maps a scalar, sequences of trees for each stack, and the number of the device to such sequences. The returned
    function takes the scalar and the sequences.
    """
    if mesh is None:
        return lambda scalar, *sequences: function(scalar, *sequences, 0)
    if not plan.stacks:
        return lambda scalar, *sequences: sequences
    slots = P(mesh.axis_names)

    def on_device(scalar: jax.Array, *sequences: Any) -> Any:
        return function(scalar, *sequences, jax.lax.axis_index(mesh.axis_names))

    def pad(x: jax.Array) -> jax.Array:
        missing = -len(x) % mesh.size
        if not missing:
            return x
        return jnp.pad(_split(x, range(1, x.ndim), mesh), [(0, missing)] + [(0, 0)] * (x.ndim - 1))

    def unpad(x: jax.Array, count: int) -> jax.Array:
        return x if len(x) == count else _split(x, range(1, x.ndim), mesh)[:count]

    def on_mesh(scalar: jax.Array, *sequences: Any) -> Any:
        padded = jax.tree.map(pad, sequences)
        # Inside, there are only one device's slots.
        run = jax.shard_map(
            on_device, mesh=mesh, in_specs=(P(), *[slots] * len(padded)), out_specs=slots, check_vma=False
        )
        return tuple(
            [
                jax.tree.map(lambda x, n=stack.count: unpad(x, n), tree)
                for stack, tree in zip(plan.stacks, trees, strict=True)
            ]
            for trees in run(scalar, *padded)
        )

    return on_mesh


def _over(axis: int, mesh: Any) -> P:
    return P(*(None,) * axis, mesh.axis_names)


def _split(x: jax.Array, axes: Sequence[int], mesh: Mesh | None) -> jax.Array:
    """Split along the last of the given axes that the devices divide, if there is one."""
    if mesh is None or mesh.size == 1:
        return x
    fitting = [axis for axis in sorted(axes) if x.shape[axis] and x.shape[axis] % mesh.size == 0]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _over(fitting[-1], mesh))) if fitting else x
