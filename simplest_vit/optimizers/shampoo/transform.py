"""The transformation behind Shampoo and SOAP: stacks of preconditioned blocks, and a diagonal method for the rest."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import sharding
from .axes import Axes, init_axes, refresh_staggered, refresh_together, update_statistics
from .blocks import as_updates, from_blocks, gradient_leaves, to_blocks
from .moments import SecondMoment, diagonal_step, init_moments
from .options import AnyOptions
from .plan import BlockStack, Plan, make_plan

VERSION = 3  # of the layout of the state


class StackState(NamedTuple):
    """The state of one stack of blocks."""

    mu: jax.Array  # (N, *block_shape), the momentum without bias correction; SOAP's is in the eigenbases
    # (N, *block_shape), the second moment, likewise; `optax.MaskedNode` if the grafting method has none.
    nu: SecondMoment
    axes: Axes  # statistics and preconditioners for each preconditioned axis


class PreconditionedState(NamedTuple):
    """The state of `scale_by_shampoo` and `scale_by_soap`: arrays only, whatever the devices."""

    # int32, the number of steps taken.
    count: jax.Array  # type: ignore[assignment]  # the field's name in every optax state
    # int8 zeros whose shape is (version of this layout, number of the method), so that it is checked like any other
    # shape.
    version: jax.Array
    # The parameters' tree: the momentum of those that are not preconditioned, `optax.MaskedNode` for the others.
    mu: Any
    nu: Any  # likewise, the second moment
    # A `StackState` for each stack of the plan; a leaf if there are no parameters, as in a call by
    # `optax.tree.map_params`.
    stacks: Any


# (plan, count, states) -> the states with new preconditioners, for some slots of all stacks.
Refresh = Callable[[Plan, jax.Array, list[StackState]], list[StackState]]
# (count, stack, state, gradients, finite, options) -> the new state and the direction of a stack.
Direction = Callable[..., tuple[StackState, jax.Array]]


def precondition(options: AnyOptions, refresh: Refresh, direction: Direction) -> optax.GradientTransformation:
    """Make the transformation of a method from its checked arguments and its two steps."""
    auto_mesh = sharding.as_auto(options.mesh)
    version = (VERSION, options.number)

    def init_stack(stack: BlockStack) -> StackState:
        blocks = jax.ShapeDtypeStruct((stack.count, *stack.block_shape), options.dtype)
        moments = init_moments(blocks, options, options.diagonal(True))
        return StackState(*moments, init_axes(stack, options))

    def init_state(plan: Plan, params: optax.Params) -> PreconditionedState:
        leaves, tree = jax.tree.flatten(params)
        diagonal, masked = options.diagonal(False), optax.MaskedNode()
        moments = [
            (masked, masked) if cut.blocks else init_moments(param, options, diagonal)
            for cut, param in zip(plan.params, leaves, strict=True)
        ]
        mu, nu = (jax.tree.unflatten(tree, [pair[i] for pair in moments]) for i in range(2))
        stacks = tuple(init_stack(stack) for stack in plan.stacks) if plan.params else jnp.zeros((), jnp.int8)
        return PreconditionedState(jnp.zeros((), jnp.int32), jnp.zeros(version, jnp.int8), mu, nu, stacks)

    def init(params: optax.Params) -> PreconditionedState:
        state = init_state(make_plan(params, options), params)
        return state._replace(stacks=sharding.shard_state(state.stacks, options.mesh))

    def update(
        updates: optax.Updates, state: PreconditionedState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, PreconditionedState]:
        given = updates if params is None else params
        plan = make_plan(given, options)
        _check(state, jax.eval_shape(functools.partial(init_state, plan), given))
        return sharding.in_auto_axes(functools.partial(step, plan), updates, state, params)

    def step(plan: Plan, updates: Any, state: PreconditionedState, params: Any) -> tuple[Any, PreconditionedState]:
        tree = updates if params is None else params
        count = optax.safe_increment(state.count)
        gradients = sharding.match_sharding(gradient_leaves(plan, updates, tree), params, auto_mesh, count)
        blocks = to_blocks(plan, gradients, auto_mesh)
        on_device = functools.partial(_step_stacks, plan=plan, refresh=refresh, direction=direction)
        run = sharding.shard_over_devices(on_device, plan, auto_mesh)
        stacks, directions = run(count, list(state.stacks) if plan.stacks else [], blocks)
        leaves = from_blocks(plan, directions, auto_mesh)
        # Parameters without blocks take the diagonal method's step.
        whole = [index for index, param in enumerate(plan.params) if not param.blocks]
        mus = jax.tree.leaves(state.mu)
        nus: list[Any] = jax.tree.leaves(state.nu) or [optax.MaskedNode()] * len(whole)
        for place, index in enumerate(whole):
            gradient, finite = _split_finite(gradients[index].astype(options.dtype))
            moments, diagonal = (mus[place], nus[place]), options.diagonal(False)
            moments, _, leaves[index] = diagonal_step(count, moments, gradient, finite, options.b1, diagonal)
            mus[place], nus[place] = moments
        mu, nu = (
            jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(new))
            for tree, new in ((state.mu, mus), (state.nu, nus))
        )
        leaves = sharding.match_sharding(leaves, params, auto_mesh, count)
        stacks = sharding.shard_state(tuple(stacks), auto_mesh) if plan.stacks else state.stacks
        return as_updates(leaves, updates, tree), PreconditionedState(count, state.version, mu, nu, stacks)

    return optax.GradientTransformation(init, update)


def _split_finite(gradient: jax.Array, axes: Sequence[int] = ()) -> tuple[jax.Array, jax.Array]:
    """Return the gradient with zeros where its square is not finite, and where it is, by whole blocks along `axes`."""
    finite = jnp.isfinite(jnp.square(gradient)).all(axes, keepdims=True)
    return jnp.where(finite, gradient, 0), finite


def _step_stacks(
    count: jax.Array,
    states: Sequence[StackState],
    gradients: Sequence[jax.Array],
    device: Any,
    *,
    plan: Plan,
    refresh: Refresh,
    direction: Direction,
) -> tuple[list[StackState], list[jax.Array]]:
    """Take step `count`, from 1, of the slots of one device.

    States and gradients (N, *block_shape) are by stack, and so are the new states and the directions (N, *block_shape).
    """
    options = plan.options
    k, start = options.precondition_frequency, options.start
    split = [_split_finite(g, range(1, g.ndim)) for g in gradients]
    states = [
        state._replace(axes=update_statistics(stack, state.axes, g, finite.reshape(-1), options))
        for stack, state, (g, finite) in zip(plan.stacks, states, split, strict=True)
    ]
    refresh_slots = functools.partial(refresh, plan, count)
    is_early = (count > start) & (count <= start + k)
    if plan.is_staggered:
        phases = jnp.where(is_early, k, 1) if options.refreshes_early and k > 1 else 1
        states = refresh_staggered(refresh_slots, states, count - 1, phases, k, device)
    else:
        is_due = (count % k == 0) & (count >= options.first_due)
        states = refresh_together(refresh_slots, states, is_due | is_early if options.refreshes_early else is_due)
    new = [
        direction(count, stack, state, gradient, finite, options)
        for stack, state, (gradient, finite) in zip(plan.stacks, states, split, strict=True)
    ]
    return [state for state, _ in new], [step for _, step in new]


def _check(state: PreconditionedState, expected: Any) -> None:
    """Compare a state with the one that the plan needs, except for names of parameters; a ValueError if they differ."""
    if state.version.shape != expected.version.shape:
        raise ValueError(
            f"state.version: its shape is {state.version.shape}: it must be {expected.version.shape}, the version of "
            "this package and its method; resume with the package and method that made the state, or make a new one."
        )
    for name in ("stacks", "mu", "nu"):
        given, needed = (_layout(name, getattr(tree, name)) for tree in (state, expected))
        if given != needed:
            raise ValueError(
                f"state.{name}: it has {given}: it must have {needed}. The state was made with other parameters or "
                "stack_axes, or a different value of an argument that sets shapes and types (max_preconditioner_dim, "
                "even_blocks, merge_dims, precondition_1d, one_sided, ignored_dim, grafting, preconditioner_dtype, "
                "mu_dtype); or a gradient is None and `params` is not given."
            )


def _layout(name: str, tree: Any) -> str:
    """Format the types and shapes of a part of the state, without the tree structure if it is the parameters'."""
    arrays = jax.tree.map(lambda x: f"{x.dtype}{x.shape}", tree)
    return str(arrays if name == "stacks" else jax.tree.leaves(arrays))


def with_learning_rate(
    scale_by: Callable[..., optax.GradientTransformation], arguments: dict[str, Any]
) -> optax.GradientTransformation:
    """Chain `scale_by` and its arguments with decoupled weight decay and the learning rate."""
    learning_rate, weight_decay, mask = (arguments.pop(name) for name in ("learning_rate", "weight_decay", "mask"))
    decay = [] if weight_decay is None else [optax.add_decayed_weights(weight_decay, mask)]
    return optax.chain(scale_by(**arguments), *decay, optax.scale_by_learning_rate(learning_rate))
