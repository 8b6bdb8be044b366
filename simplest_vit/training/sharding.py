"""The layout of a run over devices: one mesh, and one rule for each kind of array.

The mesh has two axes. `fsdp` counts the devices that share one copy of the parameters and of the optimizer's state;
`data` counts the copies. A batch is split over both. With `fsdp` 1 every device holds everything, but only its share
of the stacks of Shampoo and SOAP.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from simplest_vit.errors import UserError
from simplest_vit.optimizers.paths import path_names
from simplest_vit.optimizers.shampoo.sharding import slots_spec


def create_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange devices as [data, fsdp].

    The devices of one process are neighbours: it reads one contiguous part of each batch, and parameters are gathered
    over the fast links within a host if `fsdp` is at most its number of devices.

    Args:
      fsdp: Devices that share one copy of the parameters.
      devices: None for those of all processes.

    Raises:
      UserError: If `fsdp` does not divide the number of devices.
    """
    ordered = sorted(jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id))
    if len(ordered) % fsdp:
        raise UserError(
            f"config.fsdp={fsdp} does not divide the {len(ordered)} devices; choose a divisor of {len(ordered)}"
        )
    return Mesh(np.asarray(ordered).reshape(-1, fsdp), ("data", "fsdp"))


def check_batch_size(batch_size: int, accumulation_steps: int, mesh: Mesh) -> None:
    """Raise a UserError unless every device has an equal share of each micro-batch."""
    each = accumulation_steps * mesh.size
    if batch_size % each:
        parts = f" x {accumulation_steps} micro-batches" if accumulation_steps > 1 else ""
        raise UserError(
            f"config.batch_size={batch_size} cannot be split over {mesh.size} devices{parts}; choose a multiple of "
            f"{each}, or a number of devices that divides it"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: split along the first axis, over all devices."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def state_spec(path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Return how an array of a `TrainState` of this shape is split, given its key path from the state's root.

    - Stacks of Shampoo and SOAP: slots over all devices if they divide evenly, else another axis (`slots_spec`).
    - Matrices among the parameters, their moments and their average: the largest dimension that `fsdp` divides, and
      never the axis that stacks layers, over which the model scans.
    - Vectors, scalars and the model's constants: whole, because they are small.
    """
    names = path_names(path)
    if "stacks" in names:
        return slots_spec(shape, mesh)
    first = 1 if "blocks" in names else 0
    fsdp = mesh.shape["fsdp"]
    axes = [axis for axis in range(first, len(shape)) if shape[axis] % fsdp == 0]
    if names[0] == "constants" or fsdp == 1 or len(shape) - first < 2 or not axes:
        return PartitionSpec()
    largest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*(None,) * largest, "fsdp")


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Return a tree of the sharding of every array of a `TrainState`, or of its shapes, by `state_spec`."""
    return jax.tree_util.tree_map_with_path(lambda path, x: NamedSharding(mesh, state_spec(path, x.shape, mesh)), state)


def bytes_per_device(state: Any) -> int:
    """Count the bytes that one device holds of a state, or of its description with shardings."""
    shards = ((x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(state))
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shards)


def memory_line(state: Any) -> str:
    """Describe the mesh and the memory that the state takes."""
    mesh = jax.tree.leaves(state)[0].sharding.mesh
    return (
        f"devices: {mesh.size} (data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}); "
        f"parameters and optimizer state: {bytes_per_device(state) / 1e6:,.1f} MB per device"
    )
