"""Spreads stacks over the devices of a mesh.

Stacks whose number of blocks divides evenly are split along their slots; the few blocks that are left
over are everywhere. What runs under `spread` sees one device's slots and cannot communicate: each
device takes in the statistics, computes the roots and preconditions the blocks of its own slots, and
only the preconditioned blocks are gathered.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from simplest_vit.optimizers.shampoo.plan import Plan


def spread(function: Callable[..., Any], plan: Plan, mesh: Mesh | None) -> Callable[..., Any]:
    """Runs a function of stacks on each device's own slots.

    Args:
        function: From a scalar, the state and the gradients of the slots, one tree of arrays for each
            stack, to the new state and the directions, likewise.
        plan: The plan.
        mesh: The devices; None runs the function as it is.

    Returns:
        A function with the same arguments and results. Gradients and directions are whole on every
        device.
    """
    if mesh is None:
        return function
    specs = stack_specs(plan, mesh)

    # Cut and gathered by hand: of shardings alone XLA would make exchanges of parts of each parameter.
    def on_device(scalar: jax.Array, state: Any, gradients: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        own = [_own_slots(x, mesh) if spec else x for x, spec in zip(gradients, specs, strict=True)]
        state, directions = function(scalar, state, tuple(own))
        whole = [
            jax.lax.all_gather(x, mesh.axis_names, tiled=True) if spec else x
            for x, spec in zip(directions, specs, strict=True)
        ]
        return state, tuple(whole)

    return jax.shard_map(on_device, mesh=mesh, in_specs=(P(), specs, P()), out_specs=(specs, P()), check_vma=False)


def _own_slots(stack: jax.Array, mesh: Mesh) -> jax.Array:
    """Returns this device's slots of a whole stack."""
    count = len(stack) // mesh.size
    return jax.lax.dynamic_slice_in_dim(stack, device_index(mesh) * count, count)


def place(stacks: tuple[Any, ...], plan: Plan, mesh: Mesh | None) -> tuple[Any, ...]:
    """Returns one tree for each stack, placed on the devices that own its slots."""
    if mesh is None:
        return stacks
    return tuple(
        jax.device_put(tree, NamedSharding(mesh, spec))
        for tree, spec in zip(stacks, stack_specs(plan, mesh), strict=True)
    )


def device_index(mesh: Mesh | None) -> jax.Array | int:
    """Returns, within `spread`, which of the devices this is, in the order of their slots."""
    return 0 if mesh is None else jax.lax.axis_index(mesh.axis_names)


def slots_spec(count: int, mesh: Mesh) -> P:
    """Returns how `count` slots are laid out: over all axes of the mesh where it divides them evenly."""
    return P(mesh.axis_names) if count % mesh.size == 0 else P()


def stack_specs(plan: Plan, mesh: Mesh) -> tuple[P, ...]:
    """Returns how each stack is laid out."""
    return tuple(slots_spec(stack.count, mesh) for stack in plan.stacks)
