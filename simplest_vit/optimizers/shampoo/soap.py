"""SOAP as an optax transformation: Adam in the eigenbasis of Shampoo's preconditioner."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from .bases import refresh_basis
from .moments import diagonal_step, filter_gradient, init_moments
from .options import Number, SoapOptions, resolve_options, takes_settings_of
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
from .transform import precondition, with_learning_rate


class SoapStack(NamedTuple):
    """The state of one stack of blocks.

    Attributes:
      mu: (N, *block_shape), the gradient's average in the eigenbases, without bias correction.
      nu: (N, *block_shape), the second moment in the eigenbases.
      factors: For each preconditioned axis: statistics, and eigenbases as the preconditioner.
    """

    mu: jax.Array
    nu: jax.Array
    factors: Factors


def scale_by_soap(
    options: SoapOptions | None = None, *, stack_axes: StackAxes = None, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    r"""Run Adam in the eigenbasis of Shampoo's preconditioner.

    For each block :math:`G` with statistics :math:`L = Q_L \Lambda_L Q_L^\top` and :math:`R` likewise:

    .. math::
        G' = Q_L^\top G Q_R, \quad m \leftarrow b_1 m + (1 - b_1) G', \quad V \leftarrow b_2 V + (1 - b_2) G'^2, \quad
        \Delta = Q_L \frac{\hat m}{\sqrt{\hat V} + \epsilon} Q_R^\top.

    Both moments live in the eigenbasis, and turn with it where it is refreshed. It is the identity, and the step
    Adam's, until a block's first turn at or after the start step.

    Args:
      options: The settings; None for the defaults.
      stack_axes: As in `scale_by_shampoo`.
      mesh: As in `scale_by_shampoo`.

    Returns:
      An `optax.GradientTransformation`.

    Raises:
      ValueError: As `scale_by_shampoo`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(scale_by_soap(), optax.scale(-3e-3))
      >>> params = {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state)

    References:
      Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam, arXiv 2409.11321. New here: second moments are
      carried over to a refreshed basis (`turn_moments`); a basis is refreshed before the step, not after it; and the
      first one comes from the identity as later ones come from the last, where the authors' code decomposes.
    """
    return precondition(options or SoapOptions(), _init_stack, _step_stacks, stack_axes, mesh)


def _init_stack(stack: Stack, options: SoapOptions) -> SoapStack:
    mu, nu = init_moments((stack.count, *stack.block_shape), options, preconditioned=True)
    return SoapStack(mu, nu, init_factors(stack, options))


def turn_moments(
    mu: jax.Array, nu: jax.Array, turns: Sequence[tuple[int, jax.Array]], options: SoapOptions
) -> tuple[jax.Array, jax.Array]:
    """Carry moments over to new bases.

    The second moments are exact for uncorrelated coordinates: variances add with the squares of the rotation's entries.
    Where the basis barely moves, or its vectors only change places, they move along with the vectors.

    Args:
      mu: (N, *block_shape), averages of the coordinates in the old bases, of any type.
      nu: (N, *block_shape), averages of their squares.
      turns: Axes of a block, each with Q_new^T Q_old (N, n, n).
      options: The settings.

    Returns:
      Both in the new bases and their type; the sum of the second moments of each block is as before.
    """
    squared = [(axis, jnp.square(turn)) for axis, turn in turns]
    return multiply_axes(mu, turns, options), multiply_axes(nu, squared, options)


def _step_stacks(
    count: jax.Array, states: Sequence[SoapStack], gradients: Sequence[jax.Array], device: Any, *, plan: Plan
) -> tuple[list[SoapStack], list[jax.Array]]:
    """One step of the slots of one device; see Shampoo's."""
    options: Any = plan.options
    factors = [
        update_statistics(stack, state.factors, gradient, options)
        for stack, state, gradient in zip(plan.stacks, states, gradients, strict=True)
    ]

    def recompute(statistics: Any, old: list[SoapStack]) -> list[SoapStack]:
        def compute(matrices: jax.Array, bases: jax.Array, _: int) -> tuple[jax.Array, jax.Array]:
            return refresh_basis(matrices, bases, options)

        old_bases = [[factor.preconditioner for factor in state.factors] for state in old]
        new = []
        for stack, state, bases in zip(plan.stacks, old, by_class(plan, compute, statistics, old_bases), strict=True):
            axes = tuple(
                accept(factor, *basis, options, count >= options.start)
                for factor, basis in zip(state.factors, bases, strict=True)
            )
            turns = [
                (axis, jnp.matmul(after.preconditioner.mT, before.preconditioner, precision="highest"))
                for axis, before, after in zip(stack.axes, state.factors, axes, strict=True)
            ]
            mu, nu = turn_moments(state.mu, state.nu, turns, options)
            new.append(SoapStack(mu.astype(state.mu.dtype), nu, axes))
        return new

    statistics = [tuple(factor.statistics for factor in axes) for axes in factors]
    rest = [
        state._replace(factors=tuple(without_statistics(factor) for factor in axes))
        for state, axes in zip(states, factors, strict=True)
    ]
    rest = in_turn(recompute, statistics, rest, count, options, device)
    new, directions = [], []
    for stack, state, gradient, kept in zip(plan.stacks, rest, gradients, statistics, strict=True):
        axes = tuple(factor._replace(statistics=s) for factor, s in zip(state.factors, kept, strict=True))
        bases = [(axis, factor.preconditioner) for axis, factor in zip(stack.axes, axes, strict=True)]
        rotated = multiply_axes(gradient, [(axis, basis.mT) for axis, basis in bases], options)
        mu, momentum = filter_gradient(count, state.mu, rotated, options)
        nu, scaled = diagonal_step(count, state.nu, rotated, momentum, options.diagonal(True))
        new.append(SoapStack(mu, nu, axes))
        directions.append(multiply_axes(scaled, bases, options))
    return new, directions


@takes_settings_of(SoapOptions)
def soap(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: Number | None = None,
    mask: Any = None,
    stack_axes: StackAxes = None,
    mesh: Mesh | None = None,
    **settings: Any,
) -> optax.GradientTransformation:
    """The SOAP optimizer: `scale_by_soap`, weight decay, learning rate.

    Args:
      learning_rate: A number or a schedule.
      weight_decay: Decoupled, as in `optax.adamw`; `update` then needs `params`. None for none.
      mask: Of the decay, as in `optax.add_decayed_weights`.
      stack_axes: As in `scale_by_shampoo`.
      mesh: As in `scale_by_shampoo`.
      **settings: Fields of `SoapOptions`.

    Returns:
      An `optax.GradientTransformation`.

    Raises:
      ValueError: As `shampoo`.

    Examples:
      >>> tx = soap(3e-3, precondition_frequency=10)
    """
    scale = scale_by_soap(resolve_options("soap", **settings), stack_axes=stack_axes, mesh=mesh)
    return with_learning_rate(scale, learning_rate, weight_decay, mask)
