"""What a training loop can log about the preconditioners, without waiting for the device."""

from typing import Any

import jax
import jax.numpy as jnp

from .axes import AxisState


def shampoo_metrics(opt_state: Any) -> dict[str, jax.Array]:
    """Find Shampoo or SOAP anywhere in an optimizer state and sum up its preconditioners.

    Call it within the jitted train step: it reduces arrays and never asks for their values.

    Args:
      opt_state: Any optax state, however nested.

    Returns:
      `rejected_roots`: int32, how many computed preconditioners were rejected so far; `worst_residual`: float32, the
      greatest error of the last one computed in each slot, rejected or not. Empty if the state holds neither Shampoo
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
