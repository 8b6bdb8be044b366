"""Checks a config before anything is downloaded, compiled or written."""

import math
from typing import Any

from simplest_vit.errors import UserError
from simplest_vit.training.workdir import flatten

_POSITIVE_INTEGERS = (
    "batch_size",
    "accumulation_steps",
    "max_skipped_steps",
    "eval_every",
    "checkpoint_every",
    "log_every",
    "sam.every",
    "ema.every",
)
_NOT_NEGATIVE = (
    "seed",
    "warmup_steps",
    "grad_clip",
    "weight_decay",
    "sam.rho",
    "data.mixup_alpha",
    "data.cutmix_alpha",
    "data.crop_padding",
    "data.rand_augment.num_ops",
    "data.rand_augment.magnitude",
    "data.device_budget_bytes",
    "data.num_workers",
    "profile.first_step",
)
_UNIT_INTERVAL = ("label_smoothing", "ema.decay", "model.dropout")
_DTYPES = ("float32", "bfloat16")


def check_config(config: Any) -> None:
    """Check every field that can be judged without the data.

    Args:
      config: The run's config.

    Raises:
      UserError: Names the field, its value and the range allowed.
    """
    flat = flatten(config.to_dict())

    def require(name: str, allowed: bool, expected: str) -> None:
        if not allowed:
            raise UserError(f"config.{name}={flat[name]!r} must be {expected}")

    for name, value in flat.items():
        if isinstance(value, float) and not math.isfinite(value):
            require(name, False, "finite")
    for name in _POSITIVE_INTEGERS:
        require(name, flat[name] >= 1, "at least 1")
    for name in _NOT_NEGATIVE:
        require(name, flat[name] >= 0, "at least 0")
    for name in _UNIT_INTERVAL:
        require(name, 0 <= flat[name] < 1, "in [0, 1)")
    require("epochs", flat["epochs"] > 0, "positive")
    require("steps", flat["steps"] is None or flat["steps"] >= 1, "at least 1, or None for `epochs` to decide")
    require("compute_dtype", flat["compute_dtype"] in _DTYPES, f"one of {', '.join(_DTYPES)}")
    require("optimizer.learning_rate", flat["optimizer.learning_rate"] > 0, "positive")
    divides = config.batch_size % config.accumulation_steps == 0
    require("accumulation_steps", divides, f"a divisor of config.batch_size={config.batch_size}")
