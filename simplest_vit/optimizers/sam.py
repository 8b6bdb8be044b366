"""SAM: the gradient at the worst nearby point (Foret et al., arXiv 2010.01412)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

# Parameters -> (auxiliary output, gradient).
Gradient = Callable[[optax.Params], tuple[Any, optax.Updates]]


def sam(gradient: Gradient, rho: float, every: int, step: jax.Array) -> Gradient:
    """Wrap a gradient: on every `every`-th step it is taken at params + rho * g / |g|.

    Args:
      every: Period in steps; the others take the plain gradient and cost no second pass.
      step: int32 [], number of steps already taken.

    Returns:
      A gradient of the same signature. Its auxiliary output is that of the plain point.
    """

    def ascend(params: optax.Params) -> tuple[Any, optax.Updates]:
        auxiliary, updates = gradient(params)
        scale = rho / (optax.tree.norm(updates) + 1e-12)
        worst = jax.tree.map(lambda p, g: p + scale * g, params, updates)
        return auxiliary, gradient(worst)[1]

    if every == 1:
        return ascend
    return lambda params: jax.lax.cond(jnp.equal(step % every, 0), ascend, gradient, params)
