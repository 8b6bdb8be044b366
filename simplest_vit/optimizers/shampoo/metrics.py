"""Metrics of the preconditioners, for a training loop to log without waiting for the device."""

from typing import Any

import jax
import jax.numpy as jnp

from .axes import AxisState


def shampoo_metrics(opt_state: Any) -> dict[str, jax.Array]:
    """Find Shampoo or SOAP anywhere in an optimizer state and compute metrics of its preconditioners.

    Call it within the jitted train step: it reduces arrays and never reads their values.

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
