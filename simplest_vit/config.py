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
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from simplest_vit.errors import UserError
from simplest_vit.files import local_path


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
    return isinstance(path, str) and bool(path) and bool(local_path(path))  # which raises


def _optional(values: Values) -> Values:
    return Values(lambda value: value is None or values.allows(value), f"{values.expected}, or None", values.kind)


_DECAY = Values(lambda value: _is_number(value) and 0 <= value < 1, "a number in [0, 1)")
_FLAG = Values(lambda value: isinstance(value, bool), "True or False")
_TEXT = Values(lambda value: isinstance(value, str), "a name")
_FOLDER = _optional(Values(_folder, "the path of a folder"))

# Names, and ranges that depend on other fields, are checked by what they are for: `model_arguments`, `image_shape`,
# `create_optimizer`.
FIELDS = {
    "seed": Field(
        3407, _integer(0, 2**32 - 1), "seed of initialization, order of the examples, augmentation and dropout"
    ),
    "epochs": Field(90.0, _positive(1e6), "passes over the training split"),
    "steps": Field(None, _optional(_integer(1)), "number of steps; None: by epochs"),
    "batch_size": Field(2048, _integer(1), "examples in a step, over all devices"),
    "warmup_steps": Field(
        75, _integer(0), "steps of linear warm-up of the learning rate; then it follows a cosine to 0"
    ),
    "grad_clip": Field(1.0, _number(0, 1e9), "clip gradients to this global norm; 0: off"),
    "weight_decay": Field(0.0, _number(0, 100), "weight decay of kernels, not of biases or LayerNorm"),
    "decoupled_weight_decay": Field(False, _FLAG, "False: L2, added to the gradient; True: decoupled, as in AdamW"),
    "label_smoothing": Field(0.0, _DECAY, "share of each label that is spread over all classes"),
    "max_skipped_steps": Field(
        10, _integer(1), "stop after this many skipped steps in a row (loss or gradient not finite)"
    ),
    "fsdp": Field(1, _integer(1), "devices that share one copy of parameters and optimizer state; 1: each has its own"),
    "distributed": Field(
        None,
        _optional(_one_of("auto")),
        "auto: several processes, described by the cluster (SLURM, MPI, Kubernetes, TPU)",
    ),
    "accumulation_steps": Field(
        1, _integer(1), "micro-batches in a step, to save memory; the result is that of the whole batch"
    ),
    "compute_dtype": Field(
        "bfloat16",
        _one_of("float32", "bfloat16"),
        "dtype of the model; parameters, softmax, logits and loss stay float32",
    ),
    "eval_every": Field(240, _integer(1), "steps between two evaluations"),
    "checkpoint_every": Field(
        240, _integer(1), "steps between two checkpoints; each is evaluated, and the best validation is also saved"
    ),
    "checkpoint_minutes": Field(
        None, _optional(_positive(1e6)), "also save at a report after this many minutes without a checkpoint"
    ),
    "log_every": Field(24, _integer(1), "steps between two reports of training loss, accuracy and speed"),
    "sam.rho": Field(0.0, _number(0, 100), "radius of sharpness-aware minimization; 0: off, the reference's is 0.05"),
    "sam.every": Field(1, _integer(1), "steps between two sharpness-aware ones"),
    "ema.decay": Field(
        0.0, _DECAY, "decay of an average of the parameters, which is evaluated; 0: off, the reference's is 0.99"
    ),
    "ema.every": Field(5, _integer(1), "steps between two updates of the average"),
    "compilation_cache": Field(
        True,
        _FLAG,
        "keep compiled programs for accelerators in JAX_COMPILATION_CACHE_DIR, else in ~/.cache/simplest_vit",
    ),
    "profile.first_step": Field(0, _integer(0), "profile the steps after this one; 0: off"),
    "profile.num_steps": Field(5, _integer(1), "number of steps to profile"),
    "init_from": Field(None, _FOLDER, "fine-tuning: start from the best weights of the run in this folder"),
    "model.name": Field("simplest_vit", _TEXT, "network: simplest_vit, isometric_vit, shift_mlp or simple_vit"),
    "model.variant": Field("S", _TEXT, "Ti, S, B or L: sets depth, width, num_heads and mlp_dim if they are None"),
    "model.depth": Field(None, _optional(_integer(1, 1000)), "number of blocks"),
    "model.width": Field(None, _optional(_integer(1, 2**16)), "channels of a token"),
    "model.num_heads": Field(None, _optional(_integer(1, 2**18)), "number of heads; a divisor of the width"),
    "model.mlp_dim": Field(None, _optional(_integer(1, 2**18)), "hidden channels of an MLP"),
    "model.patch_size": Field(4, _integer(1, 2**14), "pixels; a divisor of the image size"),
    "model.dropout": Field(0.0, _DECAY, "share of the activations that is dropped in training"),
    "model.remat": Field(False, _FLAG, "recompute blocks in the backward pass, to save memory"),
    "model.attention_kernel": Field(
        "auto",
        _one_of("auto", "xla", "fused"),
        "fused: attention as one kernel, for NVIDIA GPUs from Ampere on; auto: where it is faster (docs/gpu.md)",
    ),
    # None leaves the choice to the network.
    "model.attention": Field(
        None,
        _optional(_TEXT),
        "espa, espa_causal, espa_2d, espa_reference, uspa, shift, fixed_shift, value_skipinit or softmax",
    ),
    # Beyond these, kernels of tokens are singular in float64 or the identity in float32.
    "model.gamma_max_depth": Field(0.005, _number(1e-9, 10), "E-SPA: decay at the last block"),
    "model.rho_max_depth": Field(0.8, _number(1e-9, 0.999999), "U-SPA: correlation at the last block"),
    # At 0 no query could ever reach another token.
    "model.uniform_fraction": Field(0.01, _inside(0, 1), "shift attention: share of uniform attention"),
    "model.identity_head_fraction": Field(
        0.75, _positive(1), "shift attention: share of the heads that start in place"
    ),
    "model.mlp": Field(None, _optional(_TEXT), "tat, looks_linear (orthogonal at initialization) or plain"),
    "model.activation": Field(
        None, _optional(_TEXT), "tailored_relu or relu for mlp='tat'; gelu, silu or relu for the others"
    ),
    "model.c_val_0_target": Field(0.9, _number(1e-6, 0.9999), "TAT: eta"),
    "model.init": Field(
        None,
        _optional(_TEXT),
        "espa_tat, reference (its scale of orthogonal kernels), orthogonal (all but queries and keys) or pytorch",
    ),
    "model.norm": Field(None, _optional(_TEXT), "none, or layer_norm before attention, MLP and head"),
    "model.skip": Field(None, _optional(_TEXT), "none, residual (x + f(x)) or scaled ((x + f(x)) / sqrt 2)"),
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
    "optimizer.learning_rate": Field(1e-3, _positive(1000), "peak of the learning rate"),
}

# An optimizer's own fields come from its signature (`optimizers.factory.declared`). Ranges that optax does not check:
OPTIMIZER_RANGES = {
    **dict.fromkeys(("b1", "b2", "b3", "beta", "decay", "momentum", "adam_b1", "adam_b2"), _DECAY),
    "eps": _positive(1),
    "adam_learning_rate": _positive(1000),
    "weight_decay": _number(0, 100),
    "ns_steps": _integer(1, 100),
}


def fields(optimizer: str) -> dict[str, Field]:
    """Return the table with the settings of one optimizer, by dotted name."""
    from simplest_vit.optimizers.factory import declared  # here, because it needs JAX

    own = {}
    for name, (value, kind) in declared(optimizer).items():
        values = Values(lambda value: True, "anything", kind)
        if name in OPTIMIZER_RANGES and "shampoo" not in optimizer and optimizer != "soap":  # they check their own
            values = OPTIMIZER_RANGES[name] if value is not None else _optional(OPTIMIZER_RANGES[name])
        own[f"optimizer.{name}"] = Field(value, values, f"an argument of {optimizer}")
    return FIELDS | own


def default(optimizer: str = "adam") -> ConfigDict:
    """Create the config of all defaults, for a recipe to change.

    Args:
      optimizer: Its name, because each has settings of its own.

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


def parse_arguments(arguments: str | None, **choices: str | tuple[str, ...]) -> dict[str, str]:
    """Read the `key=value,key=value` behind a config file's colon.

    Args:
      arguments: The text, or None.
      **choices: For each key its possible values, the default first; or only the default if any value is possible.

    Returns:
      A value for each key.

    Raises:
      UserError: On an unknown key or value.
    """
    options = {key: (values,) if isinstance(values, str) else values for key, values in choices.items()}
    chosen = {key: values[0] for key, values in options.items()}
    for item in filter(None, (arguments or "").split(",")):
        key, _, value = item.partition("=")
        if key not in choices:
            raise UserError(f"config argument {item!r} is unknown; expected key=value with one of {', '.join(choices)}")
        if not value or (not isinstance(choices[key], str) and value not in options[key]):
            raise UserError(
                f"config argument {key}={value} is unknown; expected {key}= one of {', '.join(options[key])}"
            )
        chosen[key] = value
    return chosen


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> dict with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def from_settings(settings: dict[str, Any]) -> ConfigDict:
    """Create a config from nested dicts, as a run's folder stores them, and `check` it."""
    flat = flatten(settings)
    config = default(str(flat.get("optimizer.name", "adam")))
    with config.ignore_type():
        config.update_from_flattened_dict(flat)
    check(config)
    return config


def suggest(name: str, table: Iterable[str] | None = None) -> str:
    """Suggest the field that was meant by an unknown one: learning_rate -> config.optimizer.learning_rate."""
    names = [*(FIELDS if table is None else table)]
    last = {each.rsplit(".", 1)[-1]: each for each in reversed(names)}
    near = [last[each] for each in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, 1)]
    near = near or difflib.get_close_matches(name, names, 1)
    return f"did you mean config.{near[0]}?" if near else "the fields are in simplest_vit/config.py"


def check(config: ConfigDict) -> None:
    """Check everything that can be judged without the data; `cli.run` does so once, before anything else.

    Args:
      config: The run's config.

    Raises:
      UserError: Names the field, its value and the values allowed.
    """
    from simplest_vit.data.dataset import image_shape
    from simplest_vit.models import model_arguments
    from simplest_vit.optimizers.factory import create_optimizer

    flat = flatten(config.to_dict())
    table = fields(str(flat.get("optimizer.name", "adam")))
    unknown = [name for name in flat if name not in table]
    optimizer = flat.get("optimizer.name")
    if any(name.startswith("optimizer.") for name in unknown) and any(
        name.startswith("optimizer.") for name in table.keys() - flat.keys()
    ):
        raise UserError(
            f"config.optimizer.name={optimizer} does not fit its other settings, which are those of another optimizer; "
            f"choose it behind the config file: --config FILE:optimizer={optimizer}, or in one of your own by "
            f'default("{optimizer}")'
        )
    for name in unknown:
        raise UserError(f"config.{name} is unknown; {suggest(name, table)}")
    for name, (value, values, meaning) in table.items():
        if name not in flat:
            raise UserError(f"config.{name} is missing; its default is {value!r} ({meaning})")
        try:
            allowed = values.allows(flat[name])
        except UserError as error:  # of `local_path`
            raise UserError(f"config.{name}={error}") from error
        if not allowed:
            raise UserError(f"config.{name}={flat[name]!r} must be {values.expected} ({meaning})")
    if config.batch_size % config.accumulation_steps:
        raise UserError(
            f"config.accumulation_steps={config.accumulation_steps} must be a divisor of "
            f"config.batch_size={config.batch_size}"
        )
    model_arguments(**config.model, image_shape=image_shape(config.data))
    create_optimizer(**config.optimizer)
