"""Shampoo as an optax transformation."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from .axes import map_by_size, multiply_axes, update_if_valid
from .moments import bias_correction, diagonal_step, graft
from .options import Grafting, Number, Precision, Root, ShampooOptions, Statistics
from .plan import BlockStack, Plan, StackAxes, make_plan
from .roots import inverse_pth_root
from .transform import StackState, precondition, with_learning_rate

# Roots with a larger backward error are rejected.
MOST_ERROR = 0.01


def scale_by_shampoo(**arguments: Any) -> optax.GradientTransformation:
    r"""Precondition gradients with Shampoo.

    For each block :math:`G` (m, n) of a gradient, with momentum :math:`\hat m` (bias-corrected):

    .. math::
        L \leftarrow b_2 L + (1 - b_2) G G^\top, \quad R \leftarrow b_2 R + (1 - b_2) G^\top G, \quad
        \Delta = \hat L^{-1/4} \, \hat m \, \hat R^{-1/4},

    scaled to the norm of the grafting method's step. For a block with k axes the exponent is -1/(2k). The arguments are
    those of `shampoo` except the learning rate, the weight decay and its mask.

    Returns:
      An `optax.GradientTransformation`. Updates have the gradients' tree and types.

    Raises:
      ValueError: For an argument out of range, with its name, value and range; from `init` for a parameter that is not
        a real floating-point array; from `update` for a state with other shapes or of another version, and for
        gradients that do not match the parameters.

    References:
      Gupta et al., Shampoo, arXiv 1802.09568; Anil et al., Scalable Second Order Optimization, arXiv 2002.09018; Shi et
      al., A Distributed Data-Parallel PyTorch Implementation, arXiv 2309.06497; KL-Shampoo, arXiv 2509.03378.
    """
    return precondition(ShampooOptions(shampoo, arguments), _refresh, _direction)


def _refresh(plan: Plan, count: jax.Array, states: list[StackState]) -> list[StackState]:
    """Compute the inverse roots of some slots from their bias-corrected statistics."""
    options: Any = plan.options
    correction = bias_correction(options.b2, count, options.dtype)
    settings = {"eps": options.eps, "relative_eps": options.relative_eps, "root": options.root}
    statistics = [[axis.statistics for axis in state.axes] for state in states]
    roots = map_by_size(plan, lambda s, p: inverse_pth_root(s / correction, p, **settings), statistics)
    axes = [
        tuple(update_if_valid(axis, *root, MOST_ERROR) for axis, root in zip(state.axes, found, strict=True))
        for state, found in zip(states, roots, strict=True)
    ]
    return [state._replace(axes=new) for state, new in zip(states, axes, strict=True)]


def _direction(
    count: jax.Array, stack: BlockStack, state: StackState, gradient: jax.Array, finite: jax.Array, options: Any
) -> tuple[StackState, jax.Array]:
    """Precondition the momentum; up to the start step, take the grafting method's own step."""
    moments, diagonal = (state.mu, state.nu), options.diagonal(True)
    moments, momentum, own = diagonal_step(count, moments, gradient, finite, options.b1, diagonal)
    roots = [(axis, s.preconditioner) for axis, s in zip(stack.axes, state.axes, strict=True)]
    direction = multiply_axes(momentum, roots, options.matmul_precision)
    if options.grafting != "none":
        direction = graft(direction, own)
    return StackState(*moments, state.axes), jnp.where(count <= options.start, own, direction)


def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-5,
    weight_decay: Number | None = None,
    mask: Any = None,
    *,
    relative_eps: bool = True,
    precondition_frequency: int = 25,
    start_preconditioning_step: int = 0,
    stagger: bool = True,
    max_preconditioner_dim: int = 384,
    even_blocks: bool = True,
    merge_dims: bool = False,
    precondition_1d: bool = False,
    one_sided: bool = False,
    ignored_dim: int = 10_000,
    root: Root = "auto",
    exponent_override: int = 0,
    statistics: Statistics = "shampoo",
    grafting: Grafting = "adam",
    grafting_b2: Number = 0.999,
    grafting_eps: Number = 1e-8,
    preconditioner_dtype: Any = "float32",
    mu_dtype: Any = "float32",
    precision: Precision = "jax",
    stack_axes: StackAxes = None,
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    """The Shampoo optimizer: `scale_by_shampoo`, with its errors, then weight decay and learning rate.

    `reference_shampoo` is the same function with the defaults of the PyTorch reference.

    Args:
      learning_rate: A number or a schedule.
      b1: Decay of the gradient's average (momentum), in [0, 1).
      b2: Decay of the statistics, in (0, 1]; 1 sums them (AdaGrad).
      eps: Damping added to the statistics before their root; if relative, at least 1e-6 (1e-14 in float64).
      weight_decay: Decoupled weight decay, as in `optax.adamw`; `update` then needs `params`. None disables it.
      mask: Mask of the weight decay, as in `optax.add_decayed_weights`.
      relative_eps: Whether `eps` is in units of the statistics' Frobenius norm.
      precondition_frequency: Steps between two computations of a preconditioner, k >= 1.
      start_preconditioning_step: Steps up to and including this one, and up to the k-th, are the grafting method's.
      stagger: Whether the computation of preconditioners is spread over steps, each once in k steps, so that all steps
        take the same time. They are all computed together, at multiples of k, if this is False or if spreading costs
        more than twice as much.
      max_preconditioner_dim: Longer dimensions are cut into blocks of at most this size, >= 1.
      even_blocks: Whether a dimension is cut into the fewest blocks, as even as possible, or into full ones and a
        remainder. Either way the last block is padded with zeros.
      merge_dims: Whether neighbouring dimensions are merged while their product is at most `max_preconditioner_dim`.
      precondition_1d: Whether vectors get a (full-matrix) preconditioner. Otherwise, and for scalars, the step is the
        grafting method's.
      one_sided: Whether only the shortest axis of each parameter (of those longer than 1) is preconditioned.
      ignored_dim: Dimensions longer than this (such as a vocabulary) are neither cut nor preconditioned.
      root: 'eigh', 'newton' (matrix products only), or 'auto': 'eigh' on a CPU, otherwise 'newton', chosen when the
        program is lowered. If `relative_eps` is False, 'auto' is 'eigh'.
      exponent_override: The p >= 1 of the inverse p-th root; 0 means twice the preconditioned axes of a block.
      statistics: 'shampoo' (G G^T), or 'kl': the gradient is first multiplied by the preconditioners of its other axes
        (KL-Shampoo), and p is 2.
      grafting: The method that determines the norm of each block's step, and the step of all other parameters (with
        'none', that step is Adam's).
      grafting_b2: Decay of the grafting method's second moment, in (0, 1); 'adagrad' sums.
      grafting_eps: Added to the root of that second moment, > 0.
      preconditioner_dtype: Type of the computation and of the state but the momentum: float32, or float64 with x64
        enabled.
      mu_dtype: Type of the stored momentum, such as bfloat16.
      precision: Precision of products that make and apply preconditioners: 'default' (TF32 on a GPU), 'high', 'highest'
        or 'jax' for `jax.default_matmul_precision`. Roots and bases always take 'highest'.
      stack_axes: The number of leading axes of each parameter that stack layers, each preconditioned separately: a tree
        of integers, a prefix of one, or a function from the parameters to it; None for no such axes.
      mesh: Devices that share statistics, roots and their computation, with Auto or Explicit axes; neither the shapes
        of the state nor the steps depend on it.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> tx = shampoo(0.05, precondition_frequency=5)
      >>> params = {"kernel": jnp.ones((8, 4))}
      >>> state = tx.init(params)
      >>> loss = lambda params: jnp.sum(jnp.square(params["kernel"]))
      >>> update = jax.jit(tx.update)
      >>> for _ in range(40):
      ...     updates, state = update(jax.grad(loss)(params), state)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(loss(params) < 1)
      True
    """
    return with_learning_rate(scale_by_shampoo, dict(locals()))  # all arguments, so that none can be forgotten


# Shampoo with the settings of the PyTorch reference (richardcepka/SimplEsT-ViT, train.py), whose steps it reproduces.
reference_shampoo = functools.partial(
    shampoo,
    eps=1e-12,
    relative_eps=False,
    stagger=False,
    max_preconditioner_dim=8192,
    even_blocks=False,
    merge_dims=True,
    precondition_1d=True,
    ignored_dim=2**31 - 1,
    root="eigh",
    precision="highest",
)


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
      ValueError: From `init` if the two trees do not have the same entries.

    Examples:
      >>> import jax.numpy as jnp
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

        def takes_each_once() -> jax.Array:
            (uses,) = jax.linear_transpose(view, params)(optax.tree.ones_like(viewed))
            return jax.tree.reduce(lambda valid, x: valid & (x == 1).all(), uses, jnp.bool_(True))

        with jax.ensure_compile_time_eval():
            if not jax.jit(takes_each_once)():
                raise ValueError("view: it must have each entry of the parameters once, unchanged.")
        return tx.init(view(params))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        viewed = None if params is None else view(params)
        viewed, state = tx.update(view(updates), state, viewed, **extra_args)
        (updates,) = jax.linear_transpose(view, updates)(viewed)
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


def shampoo_plan(params: Any, **arguments: Any) -> Plan:
    """Return the plan of `shampoo` for these parameters; print it to see how each is preconditioned, and the cost.

    The parameters are any pytree of arrays or `jax.ShapeDtypeStruct`s, the arguments and errors those of
    `scale_by_shampoo`.

    Examples:
      >>> import jax.numpy as jnp
      >>> print(shampoo_plan({"kernel": jnp.zeros((7, 4))}, max_preconditioner_dim=4))
      parameter  shape                   preconditioned as
      kernel     (7, 4)                  2 (4, 4)
      4 matrices of 4 x 4, inverse root 4
      28 parameters; state 0.0 MiB, of which statistics and preconditioners 0.0
      1.02e-06 GFLOP a step; sum of n^3 for a refresh 256, in a step 10 (all together)
    """
    return make_plan(params, ShampooOptions(shampoo, arguments))
