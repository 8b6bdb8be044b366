"""SOAP as an optax transformation: Adam in the eigenbasis of Shampoo's preconditioner."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from .axes import map_by_size, multiply_axes, update_if_valid
from .moments import diagonal_step
from .options import Basis, Number, Precision, SoapOptions
from .plan import BlockStack, Plan, StackAxes, make_plan
from .roots import refresh_basis
from .transform import StackState, precondition, with_learning_rate

# Bases that are further from orthogonal are rejected.
MOST_ERROR = 0.1


def scale_by_soap(**arguments: Any) -> optax.GradientTransformation:
    r"""Run Adam in the eigenbasis of Shampoo's preconditioner.

    For each block :math:`G` with statistics :math:`L = Q_L \Lambda_L Q_L^\top` and :math:`R` likewise:

    .. math::
        G' = Q_L^\top G Q_R, \quad m \leftarrow b_1 m + (1 - b_1) G', \quad V \leftarrow b_2 V + (1 - b_2) G'^2, \quad
        \Delta = Q_L \frac{\hat m}{\sqrt{\hat V} + \epsilon} Q_R^\top.

    Both moments are kept in the eigenbasis and rotate with it when it is refreshed. Before the start step, bases are
    the identity and steps are Adam's; in it, the bases that are due are refreshed. In each of the next k steps all
    bases are refreshed, because a basis from few gradients is poor and a refresh is only one step of an iteration.
    After that, each is refreshed once in k steps. The arguments are those of `soap` except the learning rate, the
    weight decay and its mask; errors are those of `scale_by_shampoo`.

    References:
      Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam, arXiv 2409.11321. Differences here:
      second moments are carried over to a refreshed basis (`rotate_moments`); a basis is refreshed before the step, not
      after it, and in each of the first k steps; the first basis is iterated from the identity, while the authors' code
      decomposes the statistics.
    """
    return precondition(SoapOptions(soap, arguments), _refresh, _direction)


def _refresh(plan: Plan, count: jax.Array, states: list[StackState]) -> list[StackState]:
    """Refresh the bases of some slots and rotate their moments; before the start step, change nothing."""
    options: Any = plan.options
    statistics = [[axis.statistics for axis in state.axes] for state in states]
    old = [[axis.preconditioner for axis in state.axes] for state in states]
    bases = map_by_size(plan, lambda s, q, _: refresh_basis(s, q, options.basis), statistics, old)
    new = []
    for stack, (mu, nu, axes), found in zip(plan.stacks, states, bases, strict=True):
        after = tuple(
            update_if_valid(axis, *basis, MOST_ERROR, count >= options.start)
            for axis, basis in zip(axes, found, strict=True)
        )
        rotations = [
            (axis, jnp.matmul(b.preconditioner.mT, a.preconditioner, precision="highest"))
            for axis, a, b in zip(stack.axes, axes, after, strict=True)
        ]
        rotated, squares = rotate_moments(mu, nu, rotations, options.matmul_precision)
        new.append(StackState(rotated.astype(mu.dtype), squares, after))
    return new


def rotate_moments(
    mu: jax.Array, nu: jax.Array, rotations: Sequence[tuple[int, jax.Array]], precision: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Carry moments over to new bases.

    The second moments are exact for uncorrelated coordinates: variances add up with the squares of the rotation's
    entries as weights. If the basis barely moves or its vectors are permuted, the second moments follow the vectors.
    The sum of the second moments of each block is unchanged.

    Args:
      mu: (N, *block_shape), averages of the coordinates in the old bases, of any type.
      nu: (N, *block_shape), averages of their squares.
      rotations: Axes of a block, each with Q_new^T Q_old (N, n, n).
    """
    squared = [(axis, jnp.square(rotation)) for axis, rotation in rotations]
    return multiply_axes(mu, rotations, precision), multiply_axes(nu, squared, precision)


def _direction(
    count: jax.Array, stack: BlockStack, state: StackState, gradient: jax.Array, finite: jax.Array, options: Any
) -> tuple[StackState, jax.Array]:
    """Project the gradient, take Adam's step, project back."""
    bases = [(axis, s.preconditioner) for axis, s in zip(stack.axes, state.axes, strict=True)]
    projected = multiply_axes(gradient, [(axis, q.mT) for axis, q in bases], options.matmul_precision)
    moments, diagonal = (state.mu, state.nu), options.diagonal(True)
    moments, _, step = diagonal_step(count, moments, projected, finite, options.b1, diagonal)
    return StackState(*moments, state.axes), multiply_axes(step, bases, options.matmul_precision)


def soap(
    learning_rate: optax.ScalarOrSchedule,
    b1: Number = 0.95,
    b2: Number = 0.95,
    eps: Number = 1e-8,
    weight_decay: Number | None = None,
    mask: Any = None,
    *,
    shampoo_beta: Number = 0.95,
    precondition_frequency: int = 10,
    start_preconditioning_step: int = 0,
    stagger: bool = True,
    max_preconditioner_dim: int = 384,
    merge_dims: bool = False,
    precondition_1d: bool = False,
    one_sided: bool = False,
    ignored_dim: int = 10_000,
    basis: Basis = "auto",
    preconditioner_dtype: Any = "float32",
    mu_dtype: Any = "float32",
    precision: Precision = "jax",
    stack_axes: StackAxes = None,
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    """The SOAP optimizer: `scale_by_soap`, then weight decay and learning rate.

    Arguments that are not listed, and errors, are those of `shampoo`.

    Args:
      learning_rate: A number or a schedule.
      b1: Decay of the gradient's average in the eigenbasis, in [0, 1).
      b2: Decay of the second moment in the eigenbasis, in (0, 1]; 1 sums it.
      eps: Added to the root of the second moment, > 0.
      weight_decay: Decoupled weight decay, as in `optax.adamw`; `update` then needs `params`. None disables it.
      mask: Mask of the weight decay, as in `optax.add_decayed_weights`.
      shampoo_beta: Decay of the statistics, in (0, 1]; 1 sums them.
      precondition_frequency: Steps between two refreshes of a basis, k >= 1.
      start_preconditioning_step: Steps before this one are Adam's; in it, only the blocks that are due get a basis.
      max_preconditioner_dim: Longer dimensions are cut into the fewest even blocks of at most this size, >= 1.
      precondition_1d: Whether vectors get a basis. Otherwise, and for scalars, the step is Adam's.
      basis: Update of an eigenbasis: one power iteration, orthogonalized by 'qr' (LAPACK or cuSOLVER) or 'gram_schmidt'
        (matrix products only); or 'eigh'. 'auto' is 'qr' on a CPU, otherwise 'gram_schmidt', chosen when the program is
        lowered.

    Examples:
      >>> tx = soap(3e-3, precondition_frequency=10)
    """
    return with_learning_rate(scale_by_soap, dict(locals()))  # all arguments, so that none can be forgotten


def soap_plan(params: Any, **arguments: Any) -> Plan:
    """Return the plan of `soap` for these parameters; see `shampoo_plan`."""
    return make_plan(params, SoapOptions(soap, arguments))
