"""Checks a config before anything is downloaded, compiled or written."""

import dataclasses
import difflib
import numbers
import os
from collections.abc import Callable
from typing import Any

import optax

from simplest_vit.data.builders import BUILDERS
from simplest_vit.data.dataset import image_shape
from simplest_vit.errors import UserError
from simplest_vit.models.factory import model_arguments
from simplest_vit.optimizers.factory import create_optimizer
from simplest_vit.training.workdir import flatten


@dataclasses.dataclass(frozen=True)
class _Values:
    """The values that a field may have, and how to say so."""

    allows: Callable[[Any], bool]
    expected: str


def _is_number(value: Any, kind: type = numbers.Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _integer(low: int, high: int = 2**31 - 1) -> _Values:  # steps and sizes are int32 on the device
    text = f"an integer from {low:,} to {high:,}"
    return _Values(lambda value: _is_number(value, numbers.Integral) and low <= value <= high, text)


def _number(low: float, high: float) -> _Values:
    return _Values(lambda value: _is_number(value) and low <= value <= high, f"a number from {low:g} to {high:g}")


def _positive(high: float) -> _Values:
    return _Values(lambda value: _is_number(value) and 0 < value <= high, f"a number above 0, at most {high:g}")


def _one_of(*choices: str) -> _Values:
    return _Values(lambda value: value in choices, f"one of {', '.join(choices)}")


def _folder(path: Any) -> bool:
    # What is left of a leading ~ names no user's home.
    return isinstance(path, str) and bool(path) and "\0" not in path and os.path.expanduser(path)[0] != "~"


def _optional(values: _Values) -> _Values:
    return _Values(lambda value: value is None or values.allows(value), f"{values.expected}, or None")


_DECAY = _Values(lambda value: _is_number(value) and 0 <= value < 1, "a number in [0, 1)")
_FLAG = _Values(lambda value: isinstance(value, bool), "True or False")
_TEXT = _Values(lambda value: isinstance(value, str), "a name")
_FOLDER = _optional(_Values(_folder, "the path of a folder"))
_ANY = _Values(lambda value: True, "anything")

# Names and ranges that are not here are checked by what they are for: `model_arguments`, `create_optimizer`.
FIELDS = {
    "seed": _integer(0, 2**32 - 1),
    "epochs": _positive(1e6),
    "steps": _optional(_integer(1)),
    "batch_size": _integer(1),
    "warmup_steps": _integer(0),
    "grad_clip": _number(0, 1e9),
    "weight_decay": _number(0, 100),
    "decoupled_weight_decay": _FLAG,
    "label_smoothing": _DECAY,
    "max_skipped_steps": _integer(1),
    "fsdp": _integer(1),
    "distributed": _optional(_one_of("auto")),
    "accumulation_steps": _integer(1),
    "compute_dtype": _one_of("float32", "bfloat16"),
    "eval_every": _integer(1),
    "checkpoint_every": _integer(1),
    "log_every": _integer(1),
    "sam.rho": _number(0, 100),
    "sam.every": _integer(1),
    "ema.decay": _DECAY,
    "ema.every": _integer(1),
    "profile.first_step": _integer(0),
    "profile.num_steps": _integer(1),
    "model.name": _TEXT,
    "model.variant": _TEXT,
    "model.depth": _optional(_integer(1, 1000)),
    "model.width": _optional(_integer(1, 2**16)),
    "model.num_heads": _optional(_integer(1, 2**18)),
    "model.mlp_dim": _optional(_integer(1, 2**18)),
    "model.patch_size": _integer(1, 2**14),
    "model.dropout": _DECAY,
    "model.remat": _FLAG,
    "model.attention": _TEXT,
    "model.gamma_max_depth": _number(0, 10),
    "model.rho_max_depth": _number(0, 1),
    "model.activation": _TEXT,
    "model.c_val_0_target": _number(0, 1),
    "model.init": _TEXT,
    "data.name": _one_of(*BUILDERS),
    "data.dir": _FOLDER,
    "data.manual_dir": _FOLDER,
    "data.label": _one_of("fine", "coarse"),
    "data.image_size": _optional(_integer(1, 2**14)),
    "data.random_resized_crop": _FLAG,
    "data.crop_padding": _integer(0, 2**14),
    "data.flip": _FLAG,
    "data.rand_augment.num_ops": _integer(0, 100),
    "data.rand_augment.magnitude": _integer(0, 30),
    "data.mixup_alpha": _number(0, 1000),
    "data.cutmix_alpha": _number(0, 1000),
    "data.mixup_mode": _one_of("batch", "example"),
    "data.device_budget_bytes": _integer(0, 2**60),
    "data.num_workers": _integer(0, 1024),
}

# Beside `name` and `learning_rate`; the settings of the others are arguments of their functions, which check them.
OPTIMIZER_FIELDS = {
    "adam": {"b1": _DECAY, "b2": _DECAY, "eps": _positive(1)},
    "muon": {"beta": _DECAY, "adam_learning_rate": _optional(_positive(1000))},
}


def check_config(config: Any) -> None:
    """Check every field that can be judged without the data.

    Args:
      config: The run's config.

    Raises:
      UserError: Names the field, its value and the values allowed.
    """
    flat = flatten(config.to_dict())
    settings = OPTIMIZER_FIELDS.get(str(flat.get("optimizer.name")))
    if settings is None:
        names = {name: _ANY for name in flat if name.startswith("optimizer.")}
    else:
        names = {f"optimizer.{name}": values for name, values in settings.items()}
    fields = FIELDS | names | {"optimizer.name": _TEXT, "optimizer.learning_rate": _positive(1000)}
    for name in flat:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"did you mean config.{near[0]}?" if near else "the fields are in configs/common.py"
            raise UserError(f"config.{name} is unknown; {hint}")
    for name, values in fields.items():
        _check(flat, name, values)
    if config.batch_size % config.accumulation_steps:
        raise UserError(
            f"config.accumulation_steps={config.accumulation_steps} must be a divisor of "
            f"config.batch_size={config.batch_size}"
        )
    if config.data.label == "coarse" and config.data.name != "cifar100":
        raise UserError(f"config.data.label='coarse' must be 'fine' for {config.data.name}")
    model_arguments(config.model, image_shape(config.data))
    create_optimizer(config, optax.constant_schedule(config.optimizer.learning_rate))


def _check(flat: dict[str, Any], name: str, values: _Values) -> None:
    if name not in flat:
        raise UserError(f"config.{name} is missing; its default and meaning are in configs/common.py")
    if not values.allows(flat[name]):
        raise UserError(f"config.{name}={flat[name]!r} must be {values.expected}")
