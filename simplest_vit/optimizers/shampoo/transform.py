"""Shampoo as an optax transformation."""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from simplest_vit.optimizers.shampoo.averages import bias_correction, filter_gradients, init_momentum
from simplest_vit.optimizers.shampoo.blocks import as_updates, from_blocks, gradient_leaves, to_blocks
from simplest_vit.optimizers.shampoo.grafting import SecondMoment, graft, grafted_steps, init_second_moments
from simplest_vit.optimizers.shampoo.marks import Marks, check_marks, init_marks
from simplest_vit.optimizers.shampoo.options import Grafting, Root, resolve_options
from simplest_vit.optimizers.shampoo.plan import Plan, StackAxes, make_plan
from simplest_vit.optimizers.shampoo.refresh import Factor, init_factors, refresh
from simplest_vit.optimizers.shampoo.roots import inverse_pth_root
from simplest_vit.optimizers.shampoo.sharding import place, spread
from simplest_vit.optimizers.shampoo.statistics import multiply_axes, update_statistics


class StackState(NamedTuple):
    """The state of one stack of blocks.

    Attributes:
        mu: (N, *block_shape), the gradient's average, without bias correction.
        nu: (N, *block_shape), the grafting method's second moment; `optax.MaskedNode` if it has none.
        factors: For each axis: statistics and preconditioners.
    """

    mu: jax.Array
    nu: SecondMoment
    factors: tuple[Factor, ...]


class ScaleByShampooState(NamedTuple):
    """The state of `scale_by_shampoo`: arrays only.

    Attributes:
        count: int32, the number of steps taken.
        stacks: For each stack of the plan. Entries of parameters that are not preconditioned are a
            stack of blocks without axes.
        marks: What it was made with, by name.
    """

    count: jax.Array  # type: ignore[assignment]  # the field's name in every optax state
    stacks: tuple[StackState, ...]
    marks: Marks


def scale_by_shampoo(
    *,
    preset: Literal["fast", "reference"] = "fast",
    stack_axes: StackAxes = 0,
    mesh: Mesh | None = None,
    b1: float | None = None,
    b2: float | None = None,
    epsilon: float | None = None,
    relative_epsilon: bool | None = None,
    precondition_frequency: int | None = None,
    start_preconditioning_step: int | None = None,
    stagger: bool | None = None,
    max_preconditioner_dim: int | None = None,
    merge_dims: bool | None = None,
    precondition_1d: bool | None = None,
    root: Root | None = None,
    exponent_override: int | None = None,
    max_residual: float | None = None,
    grafting: Grafting | None = None,
    grafting_b2: float | None = None,
    grafting_epsilon: float | None = None,
    preconditioner_dtype: Any = None,
    mu_dtype: Any = None,
    shards: int | None = None,
) -> optax.GradientTransformation:
    r"""Preconditions gradients with Shampoo.

    For each block :math:`G` (m, n) of a gradient, with momentum :math:`\hat m` (bias-corrected):

    .. math::
        L \leftarrow b_2 L + (1 - b_2) G G^\top, \quad R \leftarrow b_2 R + (1 - b_2) G^\top G, \quad
        \Delta = \hat L^{-1/4} \, \hat m \, \hat R^{-1/4},

    scaled to the norm of the grafting method's step. A block with k axes takes roots of 2k.

    Args:
        preset: 'fast', or 'reference', which follows the PyTorch reference's trajectory.
        stack_axes: How many leading axes of each parameter stack layers (each is preconditioned by
            itself): a tree of integers, a prefix of one (0: none), or a function from the parameters
            to it.
        mesh: Devices to spread statistics, roots and their computation over; the state's shapes do
            not depend on it.
        b1: See `ShampooOptions`, here and below; None takes the preset's value.
        b2: Decay of the statistics.
        epsilon: Damping of the statistics.
        relative_epsilon: Whether the damping is relative.
        precondition_frequency: Steps between two computations of a root.
        start_preconditioning_step: The last step that is the grafting method's own.
        stagger: Whether roots are recomputed in turns.
        max_preconditioner_dim: The size of blocks.
        merge_dims: Whether small dimensions are merged.
        precondition_1d: Whether vectors are preconditioned.
        root: How roots are computed.
        exponent_override: The root, in place of 2 x the order of the block.
        max_residual: Above which a root is rejected.
        grafting: The method whose step sizes are taken.
        grafting_b2: Decay of its second moment.
        grafting_epsilon: Its epsilon.
        preconditioner_dtype: Type of statistics and roots.
        mu_dtype: Type of the stored momentum.
        shards: A multiple of the devices to spread over; else each has all stacks.

    Returns:
        An `optax.GradientTransformation`. Updates have the gradients' tree and types.

    Raises:
        ValueError: For a setting out of range, naming the field, its value and the range; from
            `init` for a parameter that is not a real floating-point array; from `update` for a state
            that was made by another plan.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> tx = optax.chain(scale_by_shampoo(precondition_frequency=5), optax.scale(-0.1))
        >>> params = {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}
        >>> state = tx.init(params)
        >>> grads = jax.tree.map(jnp.ones_like, params)
        >>> updates, state = jax.jit(tx.update)(grads, state)
        >>> params = optax.apply_updates(params, updates)

    References:
        Gupta et al., Shampoo, arXiv 1802.09568; Anil et al., Scalable Second Order Optimization,
        arXiv 2002.09018; Shi et al., A Distributed Data-Parallel PyTorch Implementation, arXiv
        2309.06497.
    """
    if preset not in ("fast", "reference"):
        raise ValueError(f"preset={preset!r}: it must be 'fast' or 'reference'.")
    options = resolve_options(
        preset,
        b1=b1,
        b2=b2,
        epsilon=epsilon,
        relative_epsilon=relative_epsilon,
        precondition_frequency=precondition_frequency,
        start_preconditioning_step=start_preconditioning_step,
        stagger=stagger,
        max_preconditioner_dim=max_preconditioner_dim,
        merge_dims=merge_dims,
        precondition_1d=precondition_1d,
        root=root,
        exponent_override=exponent_override,
        max_residual=max_residual,
        grafting=grafting,
        grafting_b2=grafting_b2,
        grafting_epsilon=grafting_epsilon,
        preconditioner_dtype=preconditioner_dtype,
        mu_dtype=mu_dtype,
        shards=shards,
    )

    def init(params: optax.Params) -> ScaleByShampooState:
        plan = make_plan(params, options, stack_axes)
        stacks = map(StackState, init_momentum(plan), init_second_moments(plan), init_factors(plan))
        return ScaleByShampooState(jnp.zeros((), jnp.int32), place(tuple(stacks), plan, mesh), init_marks(plan))

    def update(
        updates: optax.Updates, state: ScaleByShampooState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByShampooState]:
        plan = make_plan(updates if params is None else params, options, stack_axes)
        check_factors(plan, [stack.factors for stack in state.stacks])
        check_marks(plan, state.marks)
        count = optax.safe_increment(state.count)
        step = spread(functools.partial(_step_stacks, plan=plan, mesh=mesh), plan, mesh)
        stacks, directions = step(count, state.stacks, to_blocks(plan, gradient_leaves(plan, updates)))
        leaves = from_blocks(plan, directions)
        return as_updates(plan, leaves, updates), ScaleByShampooState(count, stacks, state.marks)

    return optax.GradientTransformation(init, update)


def _step_stacks(
    count: jax.Array,
    stacks: tuple[StackState, ...],
    gradients: tuple[jax.Array, ...],
    *,
    plan: Plan,
    mesh: Mesh | None,
) -> tuple[tuple[StackState, ...], tuple[jax.Array, ...]]:
    """One step of the slots of one device.

    Args:
        count: The number of this step, from 1.
        stacks: The state.
        gradients: By stack (N, *block_shape).
        plan: The plan.
        mesh: The devices.

    Returns:
        The new state, and for each stack its directions (N, *block_shape).
    """
    options = plan.options
    correction = bias_correction(options.b2, count).astype(options.dtype)

    def compute(statistics: jax.Array, _: jax.Array, p: int) -> tuple[jax.Array, jax.Array]:
        return inverse_pth_root(statistics / correction, p, options)

    mu, momentum = filter_gradients(count, [stack.mu for stack in stacks], gradients, options)
    nu, grafted = grafted_steps(count, [stack.nu for stack in stacks], gradients, momentum, plan)
    factors = update_statistics([stack.factors for stack in stacks], gradients, options)
    factors = refresh(factors, count, plan, mesh, compute)
    directions = []
    for axes, direction, own in zip(factors, momentum, grafted, strict=True):
        if axes:
            direction = multiply_axes(direction, [factor.preconditioner for factor in axes], options)
            if options.grafting != "none":
                direction = graft(direction, own)
            own = jnp.where(count <= options.start, own, direction)
        directions.append(own)
    return tuple(map(StackState, mu, nu, factors)), tuple(directions)


def check_factors(plan: Plan, factors: Sequence[tuple[Factor, ...]]) -> None:
    """Raises ValueError where a state's factors are not those of the plan."""
    expected = jax.eval_shape(lambda: init_factors(plan))
    given = [tuple(factor.statistics.shape for factor in axes) for axes in factors]
    wanted = [tuple(factor.statistics.shape for factor in axes) for axes in expected]
    if given != wanted:
        raise ValueError(
            f"state.stacks: statistics of shapes {given}: they must be {wanted}. The state was made by "
            "another plan: with other parameters, max_preconditioner_dim, merge_dims, precondition_1d, "
            "stack_axes or shards."
        )


def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    preset: Literal["fast", "reference"] = "fast",
    weight_decay: float | None = None,
    weight_decay_mask: Any = None,
    stack_axes: StackAxes = 0,
    mesh: Mesh | None = None,
    b1: float | None = None,
    b2: float | None = None,
    epsilon: float | None = None,
    relative_epsilon: bool | None = None,
    precondition_frequency: int | None = None,
    start_preconditioning_step: int | None = None,
    stagger: bool | None = None,
    max_preconditioner_dim: int | None = None,
    merge_dims: bool | None = None,
    precondition_1d: bool | None = None,
    root: Root | None = None,
    exponent_override: int | None = None,
    max_residual: float | None = None,
    grafting: Grafting | None = None,
    grafting_b2: float | None = None,
    grafting_epsilon: float | None = None,
    preconditioner_dtype: Any = None,
    mu_dtype: Any = None,
    shards: int | None = None,
) -> optax.GradientTransformation:
    """The Shampoo optimizer: coupled weight decay, `scale_by_shampoo`, learning rate.

    Args:
        learning_rate: A number or a schedule.
        preset: 'fast', or 'reference', which follows the PyTorch reference's trajectory.
        weight_decay: Coupled (L2): this times the parameters is added to the gradients, before
            everything else; `update` then needs `params`. None for none.
        weight_decay_mask: As in `optax.add_decayed_weights`.
        stack_axes: As all that follow, see `scale_by_shampoo` and `ShampooOptions`.
        mesh: Devices to spread over.
        b1: Decay of the momentum.
        b2: Decay of the statistics.
        epsilon: Damping of the statistics.
        relative_epsilon: Whether the damping is relative.
        precondition_frequency: Steps between two computations of a root.
        start_preconditioning_step: The last step that is the grafting method's own.
        stagger: Whether roots are recomputed in turns.
        max_preconditioner_dim: The size of blocks.
        merge_dims: Whether small dimensions are merged.
        precondition_1d: Whether vectors are preconditioned.
        root: How roots are computed.
        exponent_override: The root, in place of 2 x the order of the block.
        max_residual: Above which a root is rejected.
        grafting: The method whose step sizes are taken.
        grafting_b2: Decay of its second moment.
        grafting_epsilon: Its epsilon.
        preconditioner_dtype: Type of statistics and roots.
        mu_dtype: Type of the stored momentum.
        shards: A multiple of the devices to spread over; else each has all stacks.

    Returns:
        An `optax.GradientTransformation`.

    Raises:
        ValueError: As `scale_by_shampoo`.

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
    scale = scale_by_shampoo(
        preset=preset,
        stack_axes=stack_axes,
        mesh=mesh,
        b1=b1,
        b2=b2,
        epsilon=epsilon,
        relative_epsilon=relative_epsilon,
        precondition_frequency=precondition_frequency,
        start_preconditioning_step=start_preconditioning_step,
        stagger=stagger,
        max_preconditioner_dim=max_preconditioner_dim,
        merge_dims=merge_dims,
        precondition_1d=precondition_1d,
        root=root,
        exponent_override=exponent_override,
        max_residual=max_residual,
        grafting=grafting,
        grafting_b2=grafting_b2,
        grafting_epsilon=grafting_epsilon,
        preconditioner_dtype=preconditioner_dtype,
        mu_dtype=mu_dtype,
        shards=shards,
    )
    return with_learning_rate(scale, learning_rate, weight_decay, weight_decay_mask)


def with_learning_rate(
    scale: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float | None,
    weight_decay_mask: Any,
) -> optax.GradientTransformation:
    """Chains coupled weight decay, a scaling of gradients, and the learning rate."""
    chain = [scale, optax.scale_by_learning_rate(learning_rate)]
    if weight_decay is not None:
        chain.insert(0, optax.add_decayed_weights(weight_decay, weight_decay_mask))
    return optax.chain(*chain)
