"""A wrapper that shows the parameters to a transformation in another layout."""

from collections.abc import Callable
from typing import Any

import jax
import optax


def view_as(view: Callable[[Any], Any], tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Run a transformation on another layout of the same parameters.

    The layout determines which dimensions are merged and preconditioned together. With a view of PyTorch's layout,
    `reference_shampoo` takes the same steps as the PyTorch reference.

    Args:
      view: Function from the tree of parameters to another tree of the same numbers, by transposes, reshapes,
        concatenations and indexing of stacked layers. Its inverse is derived as its transpose as a linear map.
      tx: The transformation that sees the other layout.

    Returns:
      A transformation of the first tree; its state has the layout of the second. Further arguments of `update` are
      passed on as they are.

    Raises:
      ValueError: From `init` if the two trees do not have the same number of entries.

    Examples:
      >>> import jax.numpy as jnp
      >>> from simplest_vit.optimizers.shampoo import reference_shampoo
      >>> def pytorch(params):  # (in, out) kernels -> (out, in), query, key and value as one
      ...     kernels = [params[name] for name in ("query", "key", "value")]
      ...     return {"qkv": jnp.concatenate([kernel.T for kernel in kernels])}
      >>> tx = view_as(pytorch, reference_shampoo(1e-3))
      >>> params = {name: jnp.ones((4, 4)) for name in ("query", "key", "value")}
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> updates["key"].shape
      (4, 4)
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> optax.OptState:
        viewed = jax.eval_shape(view, params)
        sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, viewed)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"view: it has {sizes[1]} entries: it must have the {sizes[0]} of the parameters.")
        return tx.init(view(params))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        viewed = None if params is None else view(params)
        viewed, state = tx.update(view(updates), state, viewed, **extra_args)
        (updates,) = jax.linear_transpose(view, updates)(viewed)
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)
