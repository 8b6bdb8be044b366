"""SOAP as an optax transformation: Adam in the eigenbasis of Shampoo's preconditioner."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from simplest_vit.optimizers.shampoo.averages import (
    accumulate,
    bias_correction,
    filter_gradients,
    init_momentum,
    keep_finite,
)
from simplest_vit.optimizers.shampoo.blocks import as_updates, from_blocks, gradient_leaves, to_blocks
from simplest_vit.optimizers.shampoo.eigenbasis import carry_second_moment, refresh_basis, rotate
from simplest_vit.optimizers.shampoo.grafting import SecondMoment, graft, grafted_steps, init_second_moments
from simplest_vit.optimizers.shampoo.marks import Marks, check_marks, init_marks
from simplest_vit.optimizers.shampoo.options import Basis, Grafting, resolve_options
from simplest_vit.optimizers.shampoo.plan import Plan, StackAxes, make_plan
from simplest_vit.optimizers.shampoo.refresh import Factor, init_factors, is_due, refresh
from simplest_vit.optimizers.shampoo.sharding import place, spread
from simplest_vit.optimizers.shampoo.statistics import multiply_axes, update_statistics
from simplest_vit.optimizers.shampoo.transform import check_factors, with_learning_rate


class SoapStackState(NamedTuple):
    """The state of one stack of blocks.

    Attributes:
        mu: (N, *block_shape), the gradient's average, without bias correction.
        nu: (N, *block_shape), the second moment of the diagonal method (Adam for blocks without axes,
            the grafting method for the others); `optax.MaskedNode` if there is none.
        rotated_nu: (N, *block_shape), the second moment in the eigenbases; `optax.MaskedNode` for blocks
            without axes.
        factors: For each axis: statistics, and eigenbases as the preconditioner.
    """

    mu: jax.Array
    nu: SecondMoment
    rotated_nu: SecondMoment
    factors: tuple[Factor, ...]


class ScaleBySoapState(NamedTuple):
    """The state of `scale_by_soap`: arrays only.

    Attributes:
        count: int32, the number of steps taken.
        stacks: For each stack of the plan.
        marks: What it was made with, by name.
    """

    count: jax.Array  # type: ignore[assignment]  # the field's name in every optax state
    stacks: tuple[SoapStackState, ...]
    marks: Marks


def scale_by_soap(
    *,
    stack_axes: StackAxes = 0,
    mesh: Mesh | None = None,
    b1: float | None = None,
    b2: float | None = None,
    eps: float | None = None,
    precondition_frequency: int | None = None,
    start_preconditioning_step: int | None = None,
    stagger: bool | None = None,
    max_preconditioner_dim: int | None = None,
    merge_dims: bool | None = None,
    precondition_1d: bool | None = None,
    basis: Basis | None = None,
    max_residual: float | None = None,
    grafting: Grafting | None = None,
    preconditioner_dtype: Any = None,
    mu_dtype: Any = None,
    shards: int | None = None,
) -> optax.GradientTransformation:
    r"""Runs Adam in the eigenbasis of Shampoo's preconditioner.

    For each block :math:`G` with statistics :math:`L = Q_L \Lambda_L Q_L^\top` and :math:`R` likewise:

    .. math::
        V \leftarrow b_2 V + (1 - b_2) (Q_L^\top G Q_R)^2, \quad
        \Delta = Q_L \frac{Q_L^\top \hat m Q_R}{\sqrt{\hat V} + \epsilon} Q_R^\top.

    Blocks, plan, staggered refresh, grafting and sharding are Shampoo's. With a basis that is never
    refreshed this is Adam.

    Args:
        stack_axes: As in `scale_by_shampoo`.
        mesh: As in `scale_by_shampoo`.
        b1: Decay of the momentum (None, here and below, takes the default in `options.SOAP`: 0.95).
        b2: Decay of the second moments and of the statistics (0.95).
        eps: Added to the root of the second moments (1e-8).
        precondition_frequency: Steps between two refreshes of a basis (10).
        start_preconditioning_step: When the first basis is computed (at
            `precondition_frequency`); Adam until then.
        stagger: Whether bases are refreshed in turns (True).
        max_preconditioner_dim: The size of blocks (384).
        merge_dims: Whether small dimensions are merged (False).
        precondition_1d: Whether vectors are rotated too (False: Adam).
        basis: How bases are refreshed, 'qr' or 'eigh' ('qr').
        max_residual: A basis further than this from orthogonal is rejected (0.1).
        grafting: The method whose step sizes are taken ('none').
        preconditioner_dtype: Type of the state (float32).
        mu_dtype: Type of the stored momentum.
        shards: A multiple of the devices to spread over (8); else each has all stacks.

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
        Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam, arXiv 2409.11321. New here:
        second moments are carried over to a refreshed basis (`carry_second_moment`).
    """
    try:
        options = resolve_options(
            "soap",
            b1=b1,
            b2=b2,
            grafting_epsilon=eps,
            precondition_frequency=precondition_frequency,
            start_preconditioning_step=start_preconditioning_step,
            stagger=stagger,
            max_preconditioner_dim=max_preconditioner_dim,
            merge_dims=merge_dims,
            precondition_1d=precondition_1d,
            basis=basis,
            max_residual=max_residual,
            grafting=grafting,
            preconditioner_dtype=preconditioner_dtype,
            mu_dtype=mu_dtype,
            shards=shards,
            grafting_b2=b2,
        )
    except ValueError as error:  # the options share a name with Shampoo's
        raise ValueError(str(error).replace("grafting_epsilon=", "eps=")) from None

    def init(params: optax.Params) -> ScaleBySoapState:
        plan = make_plan(params, options, stack_axes)
        mu = init_momentum(plan)
        rotated_nu = [
            jnp.zeros_like(zeros, options.dtype) if stack.block_shape else optax.MaskedNode()
            for stack, zeros in zip(plan.stacks, mu, strict=True)
        ]
        stacks = map(SoapStackState, mu, init_second_moments(plan), rotated_nu, init_factors(plan))
        return ScaleBySoapState(jnp.zeros((), jnp.int32), place(tuple(stacks), plan, mesh), init_marks(plan))

    def update(
        updates: optax.Updates, state: ScaleBySoapState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleBySoapState]:
        plan = make_plan(updates if params is None else params, options, stack_axes)
        check_factors(plan, [stack.factors for stack in state.stacks])
        check_marks(plan, state.marks)
        count = optax.safe_increment(state.count)
        step = spread(functools.partial(_step_stacks, plan=plan, mesh=mesh), plan, mesh)
        stacks, directions = step(count, state.stacks, to_blocks(plan, gradient_leaves(plan, updates)))
        leaves = from_blocks(plan, directions)
        return as_updates(plan, leaves, updates), ScaleBySoapState(count, stacks, state.marks)

    return optax.GradientTransformation(init, update)


def _step_stacks(
    count: jax.Array,
    stacks: tuple[SoapStackState, ...],
    gradients: tuple[jax.Array, ...],
    *,
    plan: Plan,
    mesh: Mesh | None,
) -> tuple[tuple[SoapStackState, ...], tuple[jax.Array, ...]]:
    """One step of the slots of one device; see Shampoo's."""
    options = plan.options
    correction = bias_correction(options.b2, count).astype(options.dtype)
    is_first = count == options.first_refresh

    def compute(statistics: jax.Array, old: jax.Array, _: int) -> tuple[jax.Array, jax.Array]:
        return refresh_basis(statistics, old, is_first, options)

    mu, momentum = filter_gradients(count, [stack.mu for stack in stacks], gradients, options)
    nu, grafted = grafted_steps(count, [stack.nu for stack in stacks], gradients, momentum, plan)
    factors = update_statistics([stack.factors for stack in stacks], gradients, options)
    factors = refresh(factors, count, plan, mesh, compute)
    rotated_nu: list[SecondMoment] = []
    directions = []
    for stack, axes, gradient, filtered, own in zip(stacks, factors, gradients, momentum, grafted, strict=True):
        moment = stack.rotated_nu
        if not isinstance(moment, optax.MaskedNode):
            old = [factor.preconditioner for factor in stack.factors]
            new = [factor.preconditioner for factor in axes]
            moment = jax.lax.cond(
                is_due(count, options),
                lambda v, old=old, new=new: carry_second_moment(v, old, new, options),
                lambda v: v,
                moment,
            )
            squares = jnp.square(rotate(gradient, new, options))
            moment = keep_finite(accumulate(moment, squares, options.b2), moment)
            scaled = rotate(filtered, new, options) / (jnp.sqrt(moment / correction) + options.grafting_epsilon)
            direction = multiply_axes(scaled, new, options)
            own = direction if options.grafting == "none" else graft(direction, own)
        rotated_nu.append(moment)
        directions.append(own)
    return tuple(map(SoapStackState, mu, nu, rotated_nu, factors)), tuple(directions)


def soap(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float | None = None,
    weight_decay_mask: Any = None,
    stack_axes: StackAxes = 0,
    mesh: Mesh | None = None,
    b1: float | None = None,
    b2: float | None = None,
    eps: float | None = None,
    precondition_frequency: int | None = None,
    start_preconditioning_step: int | None = None,
    stagger: bool | None = None,
    max_preconditioner_dim: int | None = None,
    merge_dims: bool | None = None,
    precondition_1d: bool | None = None,
    basis: Basis | None = None,
    max_residual: float | None = None,
    grafting: Grafting | None = None,
    preconditioner_dtype: Any = None,
    mu_dtype: Any = None,
    shards: int | None = None,
) -> optax.GradientTransformation:
    """The SOAP optimizer: coupled weight decay, `scale_by_soap`, learning rate.

    Args:
        learning_rate: A number or a schedule.
        weight_decay: Coupled (L2): this times the parameters is added to the gradients, before
            everything else; `update` then needs `params`. None for none.
        weight_decay_mask: As in `optax.add_decayed_weights`.
        stack_axes: As in `scale_by_shampoo`.
        mesh: As in `scale_by_shampoo`.
        b1: Decay of the momentum (None, here and below, takes the default in `options.SOAP`: 0.95).
        b2: Decay of the second moments and of the statistics (0.95).
        eps: Added to the root of the second moments (1e-8).
        precondition_frequency: Steps between two refreshes of a basis (10).
        start_preconditioning_step: When the first basis is computed (at
            `precondition_frequency`); Adam until then.
        stagger: Whether bases are refreshed in turns (True).
        max_preconditioner_dim: The size of blocks (384).
        merge_dims: Whether small dimensions are merged (False).
        precondition_1d: Whether vectors are rotated too (False: Adam).
        basis: How bases are refreshed, 'qr' or 'eigh' ('qr').
        max_residual: A basis further than this from orthogonal is rejected (0.1).
        grafting: The method whose step sizes are taken ('none').
        preconditioner_dtype: Type of the state (float32).
        mu_dtype: Type of the stored momentum.
        shards: A multiple of the devices to spread over (8); else each has all stacks.

    Returns:
        An `optax.GradientTransformation`.

    Raises:
        ValueError: As `scale_by_shampoo`.

    Examples:
        >>> tx = soap(3e-3, precondition_frequency=10)
    """
    scale = scale_by_soap(
        stack_axes=stack_axes,
        mesh=mesh,
        b1=b1,
        b2=b2,
        eps=eps,
        precondition_frequency=precondition_frequency,
        start_preconditioning_step=start_preconditioning_step,
        stagger=stagger,
        max_preconditioner_dim=max_preconditioner_dim,
        merge_dims=merge_dims,
        precondition_1d=precondition_1d,
        basis=basis,
        max_residual=max_residual,
        grafting=grafting,
        preconditioner_dtype=preconditioner_dtype,
        mu_dtype=mu_dtype,
        shards=shards,
    )
    return with_learning_rate(scale, learning_rate, weight_decay, weight_decay_mask)
