"""What Shampoo and SOAP have in common: a state of stacked blocks, beside a diagonal method for everything else."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from . import sharding
from .blocks import as_updates, from_blocks, gradient_leaves, to_blocks
from .moments import diagonal_step, filter_gradient, init_moments
from .options import Number, Options
from .plan import VERSION, Plan, Stack, StackAxes, make_plan


class PreconditionedState(NamedTuple):
    """The state of `scale_by_shampoo` and `scale_by_soap`: arrays only, whatever the devices.

    Attributes:
      count: int32, the number of steps taken.
      version: int8 zeros; their number is the version of this layout, which is compared as shapes are.
      mu: The parameters' tree: the momentum of those that are not preconditioned, `optax.MaskedNode` for the others.
      nu: Likewise, the second moment.
      stacks: For each stack of the plan its state, arrays with a slot for each block. The tree of a transformation
        without parameters, with which `optax.tree.map_params` asks, has a leaf here.
    """

    count: jax.Array  # type: ignore[assignment]  # the field's name in every optax state
    version: jax.Array
    mu: Any
    nu: Any
    stacks: Any


# (stack, options) -> the state of a stack, without a gradient.
InitStack = Callable[[Stack, Any], Any]
# (count, states by stack, gradients by stack, device, plan) -> new states and directions by stack.
StepStacks = Callable[..., tuple[Sequence[Any], Sequence[jax.Array]]]


def precondition(
    options: Options, init_stack: InitStack, step_stacks: StepStacks, stack_axes: StackAxes, mesh: Mesh | None
) -> optax.GradientTransformation:
    """Make a transformation of what is done to stacks of blocks.

    Args:
      options: The settings.
      init_stack: Makes the state of a stack.
      step_stacks: One step of the slots of one device.
      stack_axes: As in `scale_by_shampoo`.
      mesh: As in `scale_by_shampoo`.

    Returns:
      The transformation.
    """
    auto_mesh = sharding.as_auto(mesh)

    def init_state(plan: Plan, params: optax.Params) -> PreconditionedState:
        leaves = iter(plan.leaves)

        def moments(param: jax.Array) -> Any:
            if next(leaves).pieces:
                return optax.MaskedNode(), optax.MaskedNode()
            mu, nu = init_moments(jnp.shape(param), options, preconditioned=False)
            return jax.tree.map(lambda x: jnp.zeros_like(param, x.dtype), (mu, nu))

        both = [moments(param) for param in jax.tree.leaves(params)]
        mu, nu = (jax.tree.unflatten(jax.tree.structure(params), [pair[i] for pair in both]) for i in range(2))
        stacks = tuple(init_stack(stack, options) for stack in plan.stacks) if plan.leaves else jnp.zeros((), jnp.int8)
        return PreconditionedState(jnp.zeros((), jnp.int32), jnp.zeros(VERSION, jnp.int8), mu, nu, stacks)

    def init(params: optax.Params) -> PreconditionedState:
        state = init_state(make_plan(params, options, stack_axes), params)
        return state._replace(stacks=sharding.place(state.stacks, mesh))

    def update(
        updates: optax.Updates, state: PreconditionedState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, PreconditionedState]:
        given = updates if params is None else params
        plan = make_plan(given, options, stack_axes)
        _check(state, jax.eval_shape(functools.partial(init_state, plan), given))
        return sharding.in_auto_axes(functools.partial(step, plan), updates, state, params)

    def step(plan: Plan, updates: Any, state: PreconditionedState, params: Any) -> tuple[Any, PreconditionedState]:
        count = optax.safe_increment(state.count)
        gradients = sharding.alike(gradient_leaves(plan, updates), params, auto_mesh, count)
        constrain = sharding.constrain_blocks(auto_mesh)
        blocks = to_blocks(plan, gradients, constrain)
        run = sharding.spread(functools.partial(step_stacks, plan=plan), plan, auto_mesh)
        stacks, directions = run(count, list(state.stacks) if plan.stacks else [], blocks)
        leaves = from_blocks(plan, directions, constrain)
        whole = [index for index, leaf in enumerate(plan.leaves) if not leaf.pieces]
        mus = jax.tree.leaves(state.mu)
        nus: list[Any] = jax.tree.leaves(state.nu) or [optax.MaskedNode()] * len(whole)
        for place, index in enumerate(whole):
            gradient = gradients[index].astype(options.dtype)
            mus[place], momentum = filter_gradient(count, mus[place], gradient, options)
            nus[place], leaves[index] = diagonal_step(count, nus[place], gradient, momentum, options.diagonal(False))
        mu, nu = (
            jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(new))
            for tree, new in ((state.mu, mus), (state.nu, nus))
        )
        leaves = sharding.alike(leaves, params, auto_mesh, count)
        stacks = sharding.place(tuple(stacks), auto_mesh) if plan.stacks else state.stacks
        return as_updates(plan, leaves, updates), PreconditionedState(count, state.version, mu, nu, stacks)

    return optax.GradientTransformation(init, update)


def _check(state: PreconditionedState, expected: Any) -> None:
    """Compare a state with what the plan needs, but for the names of parameters.

    Raises:
      ValueError: Where they differ.
    """
    if state.version.shape != (VERSION,):
        raise ValueError(
            f"state.version: its shape is {state.version.shape}: it must be {(VERSION,)}, the version of this package; "
            "go on with the package that the state was made with, or make a new state."
        )
    for name in ("stacks", "mu", "nu"):
        given, needed = (_layout(name, getattr(tree, name)) for tree in (state, expected))
        if given != needed:
            raise ValueError(
                f"state.{name}: it has {given}: it must have {needed}. The state was made with other parameters or "
                "stack_axes, by another method, or with another of the settings that decide shapes and types "
                "(max_preconditioner_dim, merge_dims, precondition_1d, one_sided, ignored_dim, grafting, "
                "preconditioner_dtype, mu_dtype)."
            )


def _layout(name: str, tree: Any) -> str:
    """Write the types and shapes of a part of the state; without the tree where that is the parameters'."""
    arrays = jax.tree.map(lambda x: f"{x.dtype}{x.shape}", tree)
    return str(arrays if name == "stacks" else jax.tree.leaves(arrays))


def with_learning_rate(
    scale: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Number | None,
    mask: Any,
) -> optax.GradientTransformation:
    """Chain a scaling of gradients, decoupled weight decay and the learning rate."""
    decay = [] if weight_decay is None else [optax.add_decayed_weights(weight_decay, mask)]
    return optax.chain(scale, *decay, optax.scale_by_learning_rate(learning_rate))
