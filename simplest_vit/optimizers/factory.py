"""The optimizer of a run: the whole optax chain in one place."""

import contextlib
import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Any

import optax
from jax.sharding import Mesh

from simplest_vit.errors import UserError
from simplest_vit.models.reference_layout import pytorch_layout
from simplest_vit.optimizers import paths
from simplest_vit.optimizers.shampoo import shampoo, soap, view_as

# Optimizers by name: the config, the schedule and the mesh -> a transformation of clipped, decayed gradients.


def _adam(config: Any, learning_rate: optax.Schedule, mesh: Mesh | None) -> optax.GradientTransformation:
    settings = config.optimizer
    return optax.adam(learning_rate, settings.b1, settings.b2, settings.eps)


def _muon(config: Any, learning_rate: optax.Schedule, mesh: Mesh | None) -> optax.GradientTransformation:
    settings = config.optimizer
    ratio = (settings.adam_learning_rate or settings.learning_rate) / settings.learning_rate
    return optax.contrib.muon(
        learning_rate,
        beta=settings.beta,
        adam_learning_rate=lambda step: ratio * learning_rate(step),
        muon_weight_dimension_numbers=paths.muon_dimension_numbers,
    )


def _shampoo(config: Any, learning_rate: optax.Schedule, mesh: Mesh | None) -> optax.GradientTransformation:
    options = options_of(config.optimizer)
    if config.optimizer.preset != "reference":
        return shampoo(learning_rate, stack_axes=paths.stack_axes, mesh=mesh, **options)
    if (config.model.name, config.model.attention) == ("simplest_vit", "value_skipinit"):
        raise ValueError(
            "preset='reference' has no layout for model.attention='value_skipinit'; choose another of them"
        )
    # Which dimensions the reference merges depends on its layout: q, k and v fused, layers apart, [out, in].
    model, patch_size = config.model.name, config.model.patch_size
    tx = shampoo(learning_rate, mesh=mesh, **options)
    return view_as(lambda params: pytorch_layout(params, model, patch_size), tx)


def _soap(config: Any, learning_rate: optax.Schedule, mesh: Mesh | None) -> optax.GradientTransformation:
    return soap(learning_rate, stack_axes=paths.stack_axes, mesh=mesh, **options_of(config.optimizer))


def options_of(settings: Any) -> dict[str, Any]:
    """The settings of `config.optimizer` that are arguments of Shampoo or SOAP; None leaves the preset's."""
    beside = ("name", "learning_rate")
    return {name: value for name, value in settings.items() if name not in beside and value is not None}


OPTIMIZERS = {"adam": _adam, "muon": _muon, "shampoo": _shampoo, "soap": _soap}

# Optimizers that declare their settings as arguments, and check them.
_DECLARE: dict[str, Callable[..., Any]] = {"shampoo": shampoo, "soap": soap}
_NOT_SETTINGS = ("learning_rate", "stack_axes", "mesh", "mask", "weight_decay")


def declared(name: str) -> dict[str, tuple[Any, type]]:
    """The default and the type of each setting that an optimizer declares.

    Raises:
      UserError: If there is no such optimizer.
    """
    if name not in _DECLARE:
        raise UserError(f"config.optimizer.name={name!r} is unknown; expected one of {', '.join(OPTIMIZERS)}")
    parameters = inspect.signature(_DECLARE[name]).parameters
    return {key: (p.default, _type(p.annotation)) for key, p in parameters.items() if key not in _NOT_SETTINGS}


def _type(annotation: Any) -> type:
    """The type of a value that is not None, as a flag reads it."""
    first = (typing.get_args(annotation) or (annotation,))[0]
    if typing.get_origin(annotation) is typing.Literal:
        return type(first)
    return first if first in (bool, int, float) else _type(first) if typing.get_args(annotation) else str


def check_settings(settings: Any) -> None:
    """Check `config.optimizer` as far as its optimizer declares it.

    Raises:
      UserError: If a setting is unknown or out of range.
    """
    if settings.name in _DECLARE:
        with _told():
            _DECLARE[settings.name](settings.learning_rate, **options_of(settings))


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # its message begins with the field
        raise UserError(f"config.optimizer.{error}") from error


def create_optimizer(
    config: Any, learning_rate: optax.Schedule, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Chain: clip by global norm -> L2 decay -> optimizer with its learning rate -> decoupled decay.

    Args:
      config: The run's config; reads `grad_clip`, `weight_decay`, `decoupled_weight_decay`, `optimizer` and `model`.
      learning_rate: The schedule.
      mesh: Devices that share the work of Shampoo and SOAP; None for one.

    Returns:
      The transformation; its updates are added to the parameters.

    Raises:
      UserError: If the optimizer refuses its settings.
    """
    settings = config.optimizer
    with _told():
        chain = [OPTIMIZERS[settings.name](config, learning_rate, mesh)]
    if config.weight_decay and config.decoupled_weight_decay:
        # Behind the optimizer, whose updates already have the learning rate and its sign.
        chain.append(
            optax.add_decayed_weights(lambda step: -config.weight_decay * learning_rate(step), paths.decay_mask)
        )
    elif config.weight_decay:
        chain.insert(0, optax.add_decayed_weights(config.weight_decay, paths.decay_mask))
    if config.grad_clip:
        chain.insert(0, optax.clip_by_global_norm(config.grad_clip))
    return optax.chain(*chain)
