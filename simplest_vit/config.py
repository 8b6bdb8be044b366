"""Every field of a run's config in one table: its default, the values it may have, its meaning.

A config file is Python: its `get_config(arguments)` starts from `default()` and sets what differs. On the command line
`--config my.py:optimizer=shampoo` gives its arguments, `--config.batch_size=512` sets one field.

    from simplest_vit.config import default

    def get_config(arguments=None):
        config = default("muon")
        config.epochs = 30
        return config
"""

import difflib
import numbers
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from simplest_vit.errors import UserError


class Values(NamedTuple):
    """The values that a field may have, and how to say so; `kind` is their type where the default is None."""

    allows: Callable[[Any], bool]
    expected: str
    kind: type = str


class Field(NamedTuple):
    """A row of the table."""

    default: Any
    values: Values
    meaning: str


def _is_number(value: Any, kind: type = numbers.Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _integer(low: int, high: int = 2**31 - 1) -> Values:  # steps and sizes are int32 on the device
    text = f"an integer from {low:,} to {high:,}"
    return Values(lambda value: _is_number(value, numbers.Integral) and low <= value <= high, text, int)


def _number(low: float, high: float) -> Values:
    return Values(lambda value: _is_number(value) and low <= value <= high, f"a number from {low:g} to {high:g}", float)


def _positive(high: float) -> Values:
    return Values(lambda value: _is_number(value) and 0 < value <= high, f"a number above 0, at most {high:g}", float)


def _inside(low: float, high: float) -> Values:
    return Values(lambda value: _is_number(value) and low < value < high, f"a number in ({low:g}, {high:g})", float)


def _one_of(*choices: str) -> Values:
    return Values(lambda value: value in choices, f"one of {', '.join(choices)}")


def _folder(path: Any) -> bool:
    # What is left of a leading ~ names no user's home.
    return isinstance(path, str) and bool(path) and "\0" not in path and os.path.expanduser(path)[0] != "~"


def _optional(values: Values) -> Values:
    return Values(lambda value: value is None or values.allows(value), f"{values.expected}, or None", values.kind)


_DECAY = Values(lambda value: _is_number(value) and 0 <= value < 1, "a number in [0, 1)")
_FLAG = Values(lambda value: isinstance(value, bool), "True or False")
_TEXT = Values(lambda value: isinstance(value, str), "a name")
_FOLDER = _optional(Values(_folder, "the path of a folder"))

# Names, and ranges that depend on other fields, are checked by what they are for: `model_arguments`, `image_shape`,
# `create_optimizer`.
FIELDS = {
    "seed": Field(3407, _integer(0, 2**32 - 1), "of initialization, order of the examples, augmentation and dropout"),
    "epochs": Field(90, _positive(1e6), "passes over the training split"),
    "steps": Field(None, _optional(_integer(1)), "steps of the run, in place of epochs"),
    "batch_size": Field(2048, _integer(1), "examples in a step, over all devices"),
    "warmup_steps": Field(75, _integer(0), "of the learning rate, linear from 0; then cosine to 0"),
    "grad_clip": Field(1.0, _number(0, 1e9), "largest global norm of a gradient; 0: off"),
    "weight_decay": Field(0.0, _number(0, 100), "not on biases, not on LayerNorm"),
    "decoupled_weight_decay": Field(False, _FLAG, "False: L2, added to the gradient; True: AdamW's"),
    "label_smoothing": Field(0.0, _DECAY, "part of a label that is spread over all classes"),
    "max_skipped_steps": Field(10, _integer(1), "in a row, for a loss or gradient not finite; then the run stops"),
    "fsdp": Field(1, _integer(1), "devices that share one copy of parameters and optimizer state; 1: each has its own"),
    "distributed": Field(None, _optional(_one_of("auto")), "auto: several processes, as the cluster says"),
    "accumulation_steps": Field(1, _integer(1), "micro-batches in a step; the result is that of the whole batch"),
    "compute_dtype": Field(
        "bfloat16", _one_of("float32", "bfloat16"), "of the model; parameters, softmax, logits and loss are float32"
    ),
    "eval_every": Field(240, _integer(1), "steps between two evaluations"),
    "checkpoint_every": Field(240, _integer(1), "steps between two checkpoints; each is evaluated"),
    "checkpoint_minutes": Field(None, _optional(_positive(1e6)), "at most so long without a checkpoint, at a report"),
    "log_every": Field(24, _integer(1), "steps between two lines of progress"),
    "sam.rho": Field(0.0, _number(0, 100), "sharpness-aware minimization: radius; 0: off, 0.05 is the reference's"),
    "sam.every": Field(1, _integer(1), "steps between two that are sharpness-aware"),
    "ema.decay": Field(0.0, _DECAY, "of an average of the parameters; 0: off, 0.99 is the reference's"),
    "ema.every": Field(5, _integer(1), "steps between two updates of the average"),
    "compilation_cache": Field(
        True, _FLAG, "keep programs for accelerators in ~/.cache/simplest_vit, or in JAX_COMPILATION_CACHE_DIR"
    ),
    "profile.first_step": Field(0, _integer(0), "where a profile begins; 0: off"),
    "profile.num_steps": Field(5, _integer(1), "steps of a profile"),
    "init_from": Field(None, _FOLDER, "fine-tuning: the folder of a run, whose best weights are the first of this one"),
    "model.name": Field("simplest_vit", _TEXT, "or simple_vit"),
    "model.variant": Field("S", _TEXT, "Ti, S, B or L: sets the four sizes below where they are None"),
    "model.depth": Field(None, _optional(_integer(1, 1000)), "blocks"),
    "model.width": Field(None, _optional(_integer(1, 2**16)), "channels of a token"),
    "model.num_heads": Field(None, _optional(_integer(1, 2**18)), "of attention; a divisor of the width"),
    "model.mlp_dim": Field(None, _optional(_integer(1, 2**18)), "hidden channels of an MLP"),
    "model.patch_size": Field(4, _integer(1, 2**14), "pixels; a divisor of the image size"),
    "model.dropout": Field(0.0, _DECAY, "part of the activations that is dropped"),
    "model.remat": Field(False, _FLAG, "recompute blocks in the backward pass, to save memory"),
    "model.attention_kernel": Field(
        "auto",
        _one_of("auto", "xla", "fused"),
        "fused: attention as one kernel, for NVIDIA GPUs from Ampere on; auto: where it is faster (docs/gpu.md)",
    ),
    "model.attention": Field(
        "espa", _TEXT, "or espa_causal, espa_2d, espa_reference, uspa, shift, fixed_shift, value_skipinit, unshaped"
    ),
    # Beyond these, kernels of tokens are singular in float64 or the identity in float32.
    "model.gamma_max_depth": Field(0.005, _number(1e-9, 10), "E-SPA: decay at the last block"),
    "model.rho_max_depth": Field(0.8, _number(1e-9, 0.999999), "U-SPA: correlation at the last block"),
    # At 0 no query could ever reach another token.
    "model.shift_eps": Field(0.01, _inside(0, 1), "shift attention: share of uniform attention"),
    "model.shift_in_place": Field(0.75, _positive(1), "shift attention: share of the heads that start in place"),
    "model.mlp": Field("shaped", _TEXT, "or mirrored: an orthogonal map at initialization"),
    "model.activation": Field("tailored_relu", _TEXT, "or relu; gelu, silu or relu where the MLP is mirrored"),
    "model.c_val_0_target": Field(0.9, _number(1e-6, 0.9999), "TAT: eta"),
    "model.init": Field(
        "paper", _TEXT, "or reference: the reference's scale of orthogonal kernels; isometric: all orthogonal"
    ),
    "data.name": Field(
        "digits", _TEXT, "or cifar10, cifar100, tiny_imagenet, imagenet, image_folder; or a set that TFDS prepared"
    ),
    "data.dir": Field(None, _FOLDER, "of prepared data sets; None: ~/tensorflow_datasets"),
    "data.manual_dir": Field(None, _FOLDER, "of the original files, where they are not downloaded"),
    "data.label": Field(
        None,
        _optional(_TEXT),
        "class label to learn, such as coarse_label of cifar100; None: label, or the only one",
    ),
    "data.train_split": Field("train", _TEXT, "in TFDS's syntax, such as train[:45000]"),
    "data.validation_split": Field(
        None, _optional(_TEXT), "in TFDS's syntax, such as train[45000:]; None: validation, or else test"
    ),
    "data.image_size": Field(
        None, _optional(_integer(1, 2**14)), "pixels; None: the images' own, or 224 where they differ"
    ),
    "data.random_resized_crop": Field(False, _FLAG, "ImageNet's augmentation, on the host; before crop_padding's"),
    "data.crop_padding": Field(4, _integer(0, 2**14), "random crop from the image, padded by so many pixels; 0: off"),
    "data.flip": Field(True, _FLAG, "mirror half of the images"),
    "data.rand_augment.num_ops": Field(0, _integer(0, 100), "RandAugment: operations for each image; 0: off"),
    "data.rand_augment.magnitude": Field(10, _integer(0, 30), "RandAugment: their strength"),
    "data.mixup_alpha": Field(0.0, _number(0, 1000), "lambda = min(z, 1 - z), z ~ Beta(alpha, alpha); 0: off"),
    "data.cutmix_alpha": Field(0.0, _number(0, 1000), "likewise; with both, each batch draws one of them"),
    "data.mixup_mode": Field("batch", _one_of("batch", "example"), "one lambda or box a batch, or for each image"),
    "data.device_budget_bytes": Field(
        2_000_000_000, _integer(0, 2**60), "data sets of uint8 images up to this size live on the device"
    ),
    "data.num_workers": Field(
        None, _optional(_integer(0, 1024)), "processes that decode larger ones; 0: threads of this one; None: by cores"
    ),
    "optimizer.name": Field("adam", _TEXT, "or muon, shampoo, soap, or any optimizer of optax by its name there"),
    "optimizer.learning_rate": Field(1e-3, _positive(1000), "at its peak"),
}

# An optimizer's own fields come from its signature (`optimizers.factory.declared`). Ranges that optax does not check:
OPTIMIZER_RANGES = {
    **dict.fromkeys(("b1", "b2", "b3", "beta", "decay", "momentum", "adam_b1", "adam_b2"), _DECAY),
    "eps": _positive(1),
    "adam_learning_rate": _positive(1000),
    "weight_decay": _number(0, 100),
    "ns_steps": _integer(1, 100),
}

# What makes a vanilla network trainable: the fields of `config.model` that belong together.
METHODS = {
    "espa_tat": {"attention": "espa", "mlp": "shaped", "activation": "tailored_relu", "init": "paper"},
    "isometric": {"attention": "shift", "mlp": "mirrored", "activation": "gelu", "init": "isometric"},
}


def fields(optimizer: str) -> dict[str, Field]:
    """Return the table with the settings of one optimizer, by dotted name."""
    from simplest_vit.optimizers.factory import declared  # here, because it needs JAX

    own = {}
    for name, (value, kind) in declared(optimizer).items():
        values = Values(lambda value: True, "anything", kind)
        if name in OPTIMIZER_RANGES and optimizer not in ("shampoo", "soap"):  # which check their own
            values = OPTIMIZER_RANGES[name] if value is not None else _optional(OPTIMIZER_RANGES[name])
        own[f"optimizer.{name}"] = Field(value, values, f"an argument of {optimizer}")
    return FIELDS | own


def default(optimizer: str = "adam") -> ConfigDict:
    """Create the config of all defaults.

    Args:
      optimizer: Its name, for each has settings of its own.

    Returns:
      The config, for a recipe to change.

    Raises:
      UserError: If there is no such optimizer.
    """
    nested: dict[str, Any] = {}
    for name, (value, values, _) in (fields(optimizer) | {"optimizer.name": Field(optimizer, _TEXT, "")}).items():
        *sections, last = name.split(".")
        section = nested
        for part in sections:
            section = section.setdefault(part, {})
        section[last] = placeholder(values.kind) if value is None else value
    return ConfigDict(nested)


def parse_arguments(arguments: str | None, **choices: tuple[str, ...]) -> dict[str, str]:
    """Read the `key=value,key=value` behind a config file's colon.

    Args:
      arguments: The text, or None.
      **choices: For each key its possible values, the default first.

    Returns:
      A value for each key.

    Raises:
      UserError: On an unknown key or value.
    """
    values = {key: options[0] for key, options in choices.items()}
    for item in filter(None, (arguments or "").split(",")):
        key, _, value = item.partition("=")
        if key not in choices:
            raise UserError(f"config argument {item!r} is unknown; expected key=value with one of {', '.join(choices)}")
        if value not in choices[key]:
            raise UserError(
                f"config argument {key}={value} is unknown; expected {key}= one of {', '.join(choices[key])}"
            )
        values[key] = value
    return values


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> dict with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def check(config: ConfigDict) -> None:
    """Check everything that can be judged without the data; `cli.run` does so once, before anything else.

    Args:
      config: The run's config.

    Raises:
      UserError: Names the field, its value and the values allowed.
    """
    from simplest_vit.data.dataset import image_shape
    from simplest_vit.models.factory import model_arguments
    from simplest_vit.optimizers.factory import create_optimizer

    flat = flatten(config.to_dict())
    table = fields(str(flat.get("optimizer.name", "adam")))
    for name in flat:
        if name not in table:
            near = difflib.get_close_matches(name, table, 1)
            hint = f"did you mean config.{near[0]}?" if near else "the fields are in simplest_vit/config.py"
            raise UserError(f"config.{name} is unknown; {hint}")
    for name, (value, values, meaning) in table.items():
        if name not in flat:
            raise UserError(f"config.{name} is missing; its default is {value!r} ({meaning})")
        if not values.allows(flat[name]):
            raise UserError(f"config.{name}={flat[name]!r} must be {values.expected} ({meaning})")
    if config.batch_size % config.accumulation_steps:
        raise UserError(
            f"config.accumulation_steps={config.accumulation_steps} must be a divisor of "
            f"config.batch_size={config.batch_size}"
        )
    model_arguments(config.model, image_shape(config.data))
    create_optimizer(**config.optimizer)
