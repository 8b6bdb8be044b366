"""The optimizer of a run, chosen by name and built as one optax chain, and its learning rate."""

import contextlib
import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import numpy as np
import optax
import optax.contrib
from jax.sharding import Mesh

from simplest_vit.errors import UserError, did_you_mean
from simplest_vit.optimizers import paths
from simplest_vit.optimizers.shampoo import reference_shampoo, shampoo, soap, view_as


@dataclasses.dataclass(frozen=True)
class WarmupCosine:
    """A schedule: linear warm-up from 0, then a cosine to 0.

    During warm-up, step t (from 0) has the rate peak * (t + 1) / warmup_steps, so that the first step is not wasted on
    a rate of 0. The last step of the run has the rate 0, or the peak if all steps are warm-up.
    """

    peak: float
    warmup_steps: int  # steps of warm-up; at most `total_steps` are used
    total_steps: int

    def __call__(self, step: jax.typing.ArrayLike) -> jax.Array:
        """Return the learning rate of a step, counted from 0."""
        warmup_steps = min(self.warmup_steps, self.total_steps)
        total_steps = max(self.total_steps, warmup_steps + 1)
        return optax.warmup_cosine_decay_schedule(0.0, self.peak, warmup_steps, total_steps)(step + 1)


# optax optimizers that a run cannot use: in each update they need the loss, its Hessian or a random key, or they
# evaluate other parameters than they take gradients at, or they take no schedule; `galore` projects matrices alone, not
# stacks of them, and under `jax.vmap` would decompose them in every step; `optimistic_adam` is deprecated.
_UNUSABLE = {"galore", "lbfgs", "momo", "momo_adam", "noisy_sgd", "optimistic_adam", "rprop", "sm3", "sophia"}
_UNUSABLE |= {"schedule_free_adamw", "schedule_free_sgd"}
# optax optimizers that take a norm or a mean of each array, which must not mix blocks; so does Muon if it is adaptive.
_BY_ARRAY = {"adafactor", "fromage", "lamb", "lars", "novograd"}
# Arguments that the run sets, not the user. The mask selects the parameters that decay.
_MASKS = ("mask", "weight_decay_mask")
_FROM_THE_RUN = {"learning_rate", "weight_decay", "stack_axes", "mesh", "muon_weight_dimension_numbers", *_MASKS}
# The chain applies the weight decay of these, because it may be L2 or because they would decay all parameters; other
# optimizers with a weight decay apply their own.
_SHAMPOOS: dict[str, Any] = {"reference_shampoo": reference_shampoo, "shampoo": shampoo, "soap": soap}
_DECAYED_OUTSIDE = {"muon", *_SHAMPOOS}
_FUNCTIONS = (types.FunctionType, functools.partial)


@functools.cache
def optimizers() -> dict[str, Callable[..., optax.GradientTransformation]]:
    """Return all optimizers by name: those of optax and `optax.contrib`, Shampoo and SOAP."""
    found = {
        name: function
        for module in (optax, optax.contrib)
        for name, function in vars(module).items()
        if isinstance(function, _FUNCTIONS) and not name.startswith(("_", "scale_by_")) and name not in _UNUSABLE
    }
    return {name: function for name, function in found.items() if _takes_only_a_rate(function)} | _SHAMPOOS


def _takes_only_a_rate(function: Callable[..., Any]) -> bool:
    parameters = list(inspect.signature(function).parameters.values())
    needed = [parameter.name for parameter in parameters[1:] if parameter.default is inspect.Parameter.empty]
    return bool(parameters) and parameters[0].name == "learning_rate" and not needed


def declared(name: str) -> dict[str, tuple[Any, type]]:
    """Read the settings of an optimizer from its signature.

    Args:
      name: As in optax, such as 'adamw'.

    Returns:
      For each setting its default and the type of its values; only numbers, names and flags are included.

    Raises:
      UserError: If there is no such optimizer; the message suggests similar names.
    """
    settings = {}
    for key, parameter in inspect.signature(_named(name)).parameters.items():
        kind = _kind(parameter)
        if kind is not None and key not in _FROM_THE_RUN:
            settings[key] = parameter.default, kind
    return settings


def _named(name: str) -> Callable[..., optax.GradientTransformation]:
    if name in optimizers():
        return optimizers()[name]
    hint = did_you_mean(str(name).lower(), optimizers(), "expected shampoo, soap or an optimizer of optax by its name")
    raise UserError(f"config.optimizer.name={name!r} is unknown; {hint}")


def _kind(parameter: inspect.Parameter) -> type | None:
    """Return the type of a setting's values, or None if a command-line flag cannot set it."""
    if isinstance(parameter.default, bool | int | float | str):
        return type(parameter.default)
    if parameter.default is not None:
        return None
    if float in typing.get_args(parameter.annotation):  # such as `float | jax.Array`
        return float
    return str if parameter.name.endswith("dtype") else None


def decays_itself(name: str) -> bool:
    """Return whether an optimizer of optax applies the weight decay in its own way, as AdamW and LARS do."""
    takes_one = "weight_decay" in inspect.signature(_named(name)).parameters
    return takes_one and bool(_masks(name)) and name not in _DECAYED_OUTSIDE


def _masks(name: str) -> list[str]:
    return [key for key in _MASKS if key in inspect.signature(_named(name)).parameters]


def create_optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule | WarmupCosine,
    *,
    grad_clip: float = 0.0,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    mesh: Mesh | None = None,
    layout: Callable[[optax.Params], Any] | None = None,
    **arguments: Any,
) -> optax.GradientTransformation:
    """Build the chain: clip by global norm -> L2 decay -> optimizer with its learning rate -> decoupled decay.

    Args:
      name: An optax optimizer, 'shampoo', 'reference_shampoo' or 'soap'.
      learning_rate: A number or a schedule.
      grad_clip: The largest global norm of a gradient; 0 disables clipping.
      weight_decay: Weight decay of kernels only. It is passed to optax optimizers with a weight decay and a mask, such
        as AdamW.
      decoupled_weight_decay: For all other optimizers: False adds the decay to the gradient (L2); True adds it to the
        update, times the learning rate.
      mesh: Devices that share the work of Shampoo and SOAP; None for one.
      layout: Function from parameters to the layout in which `reference_shampoo` sees them; None for their own.
      **arguments: The optimizer's own settings, as `declared` lists them.

    Raises:
      UserError: If the optimizer is unknown or rejects an argument.
    """
    function = _named(name)
    given = dict(arguments)
    if name in _SHAMPOOS:
        given["mesh"] = mesh
        # In the reference's layout layers are already separate; without it, they are preconditioned as one.
        given["stack_axes"] = None if name == "reference_shampoo" else paths.stack_axes
    else:
        given |= dict.fromkeys(_masks(name), paths.decay_mask)
    if name == "muon":
        given |= _of_muon(learning_rate, given)
    if decays_itself(name):
        given["weight_decay"], weight_decay = weight_decay, 0.0
    try:
        tx = function(learning_rate, **given)
    except (TypeError, ValueError) as error:  # its message begins with the field
        raise UserError(f"config.optimizer.{error}") from error
    if name in _BY_ARRAY or given.get("adaptive"):
        by_block = optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))
        tx = optax.partition({0: tx, 1: by_block}, paths.stack_axes)
    # Which dimensions the reference merges depends on its layout: q, k and v fused, layers separate, [out, in].
    chain = [view_as(layout, tx) if name == "reference_shampoo" and layout is not None else tx]
    if weight_decay and decoupled_weight_decay:
        # After the optimizer, whose updates already include the learning rate and its sign.
        rate = learning_rate if callable(learning_rate) else optax.constant_schedule(learning_rate)
        chain.append(optax.add_decayed_weights(lambda step: -weight_decay * rate(step), paths.decay_mask))
    elif weight_decay:
        chain.insert(0, optax.add_decayed_weights(weight_decay, paths.decay_mask))
    if grad_clip:
        chain.insert(0, optax.clip_by_global_norm(grad_clip))
    return optax.chain(*chain)


def settings_without_effect(
    settings: Any, given: Collection[str], params: optax.Params, layout: Callable[[optax.Params], Any]
) -> Iterator[str]:
    """Yield each of the given config fields whose default would update these parameters by the same program."""

    @functools.cache
    def program(**own: Any) -> Any:
        with contextlib.suppress(UserError):  # because a default may not fit the other settings
            tx = create_optimizer(**{**settings, "learning_rate": 1.0, **own}, layout=layout)
            traced = jax.make_jaxpr(lambda params: tx.update(params, tx.init(params), params))(params)
            return str(traced.jaxpr), [np.asarray(x).tobytes() for x in traced.consts]

    for name, (default, _) in declared(settings.name).items():
        field, is_changed = f"optimizer.{name}", settings[name] != default
        if field in given and is_changed and program(**{name: default}) == program():
            yield field


def _of_muon(learning_rate: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Choose the parameters that Muon updates; Adam's learning rate follows the run's schedule with its own peak."""
    peak = given.get("adam_learning_rate")
    if peak is not None and isinstance(learning_rate, WarmupCosine):
        peak = dataclasses.replace(learning_rate, peak=peak)
    return {"adam_learning_rate": peak, "muon_weight_dimension_numbers": paths.muon_dimension_numbers}
