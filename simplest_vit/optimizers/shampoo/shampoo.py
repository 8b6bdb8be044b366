"""Shampoo as an optax transformation."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from .moments import SecondMoment, bias_correction, diagonal_step, filter_gradient, graft, init_moments
from .options import Number, ShampooOptions, resolve_options, takes_settings_of
from .plan import Plan, Stack, StackAxes
from .preconditioners import (
    Factors,
    accept,
    by_class,
    in_turn,
    init_factors,
    multiply_axes,
    update_statistics,
    without_statistics,
)
from .roots import inverse_pth_root
from .transform import precondition, with_learning_rate


class ShampooStack(NamedTuple):
    """The state of one stack of blocks.

    Attributes:
      mu: (N, *block_shape), the gradient's average, without bias correction.
      nu: (N, *block_shape), the grafting method's second moment; `optax.MaskedNode` if it has none.
      factors: For each preconditioned axis: statistics and inverse roots.
    """

    mu: jax.Array
    nu: SecondMoment
    factors: Factors


def scale_by_shampoo(
    options: ShampooOptions | None = None, *, stack_axes: StackAxes = None, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    r"""Precondition gradients with Shampoo.

    For each block :math:`G` (m, n) of a gradient, with momentum :math:`\hat m` (bias-corrected):

    .. math::
        L \leftarrow b_2 L + (1 - b_2) G G^\top, \quad R \leftarrow b_2 R + (1 - b_2) G^\top G, \quad
        \Delta = \hat L^{-1/4} \, \hat m \, \hat R^{-1/4},

    scaled to the norm of the grafting method's step. A block with k axes takes roots of 2k.

    Args:
      options: The settings; None for the defaults.
      stack_axes: How many leading axes of each parameter stack layers (each is preconditioned by itself): a tree of
        integers, a prefix of one, or a function from the parameters to it; None for no such axes.
      mesh: Devices to spread statistics, roots and their computation over, with Auto or Explicit axes; neither the
        state's shapes nor the steps depend on it.

    Returns:
      An `optax.GradientTransformation`. Updates have the gradients' tree and types.

    Raises:
      ValueError: From `init` for a parameter that is not a real floating-point array; from `update` for a state of
        other shapes or of another version, and for gradients that are not the parameters'.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(scale_by_shampoo(ShampooOptions(precondition_frequency=5)), optax.scale(-0.1))
      >>> params = {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}
      >>> state = tx.init(params)
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> updates, state = jax.jit(tx.update)(grads, state)
      >>> params = optax.apply_updates(params, updates)

    References:
      Gupta et al., Shampoo, arXiv 1802.09568; Anil et al., Scalable Second Order Optimization, arXiv 2002.09018; Shi et
      al., A Distributed Data-Parallel PyTorch Implementation, arXiv 2309.06497; KL-Shampoo, arXiv 2509.03378.
    """
    return precondition(options or ShampooOptions(), _init_stack, _step_stacks, stack_axes, mesh)


def _init_stack(stack: Stack, options: ShampooOptions) -> ShampooStack:
    # With an absolute epsilon the statistics start at epsilon I, as in the PyTorch reference.
    statistics = 0.0 if options.relative_epsilon else options.epsilon
    moments = init_moments((stack.count, *stack.block_shape), options, preconditioned=True)
    return ShampooStack(*moments, init_factors(stack, options, statistics, options.initial_preconditioner))


def _step_stacks(
    count: jax.Array, states: Sequence[ShampooStack], gradients: Sequence[jax.Array], device: Any, *, plan: Plan
) -> tuple[list[ShampooStack], list[jax.Array]]:
    """One step of the slots of one device.

    Args:
      count: The number of this step, from 1.
      states: By stack.
      gradients: By stack (N, *block_shape).
      device: The number of the device.
      plan: The plan.

    Returns:
      The new states, and for each stack its directions (N, *block_shape).
    """
    options: Any = plan.options
    correction = bias_correction(options.b2, count, options.dtype)
    whitened = options.statistics == "kl"
    factors = [
        update_statistics(stack, state.factors, gradient, options, whitened)
        for stack, state, gradient in zip(plan.stacks, states, gradients, strict=True)
    ]

    def recompute(statistics: Any, old: Any) -> Any:
        def compute(matrices: jax.Array, p: int) -> tuple[jax.Array, jax.Array]:
            return inverse_pth_root(matrices / correction, p, options)

        roots = by_class(plan, compute, statistics)
        return [
            tuple(accept(factor, *root, options) for factor, root in zip(*pair, strict=True))
            for pair in zip(old, roots, strict=True)
        ]

    statistics = [tuple(factor.statistics for factor in axes) for axes in factors]
    rest = [tuple(without_statistics(factor) for factor in axes) for axes in factors]
    rest = in_turn(recompute, statistics, rest, count, options, device)
    new, directions = [], []
    for stack, state, gradient, kept, axes in zip(plan.stacks, states, gradients, statistics, rest, strict=True):
        axes = tuple(factor._replace(statistics=s) for factor, s in zip(axes, kept, strict=True))
        mu, momentum = filter_gradient(count, state.mu, gradient, options)
        nu, own = diagonal_step(count, state.nu, gradient, momentum, options.diagonal(True))
        roots = [(axis, factor.preconditioner) for axis, factor in zip(stack.axes, axes, strict=True)]
        direction = multiply_axes(momentum, roots, options)
        if options.grafting != "none":
            direction = graft(direction, own)
        new.append(ShampooStack(mu, nu, axes))
        directions.append(jnp.where(count <= options.start, own, direction))
    return new, directions


@takes_settings_of(ShampooOptions)
def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    preset: Literal["fast", "reference"] = "fast",
    weight_decay: Number | None = None,
    mask: Any = None,
    stack_axes: StackAxes = None,
    mesh: Mesh | None = None,
    **settings: Any,
) -> optax.GradientTransformation:
    """The Shampoo optimizer: `scale_by_shampoo`, weight decay, learning rate.

    Args:
      learning_rate: A number or a schedule.
      preset: 'fast', or 'reference', which follows the PyTorch reference's trajectory.
      weight_decay: Decoupled, as in `optax.adamw`; `update` then needs `params`. None for none.
      mask: Of the decay, as in `optax.add_decayed_weights`.
      stack_axes: As in `scale_by_shampoo`.
      mesh: As in `scale_by_shampoo`.
      **settings: Fields of `ShampooOptions`, in place of the preset's.

    Returns:
      An `optax.GradientTransformation`.

    Raises:
      ValueError: For a setting out of range, naming it, its value and the range; else as `scale_by_shampoo`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> tx = shampoo(0.05, precondition_frequency=5)
      >>> params = {"kernel": jnp.ones((8, 4))}
      >>> state = tx.init(params)
      >>> loss = lambda params: jnp.sum(jnp.square(params["kernel"]))
      >>> for _ in range(40):
      ...     updates, state = tx.update(jax.grad(loss)(params), state)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(loss(params) < 1)
      True
    """
    if preset not in ("fast", "reference"):
        raise ValueError(f"preset={preset!r}: it must be 'fast' or 'reference'.")
    scale = scale_by_shampoo(resolve_options(preset, **settings), stack_axes=stack_axes, mesh=mesh)
    return with_learning_rate(scale, learning_rate, weight_decay, mask)
