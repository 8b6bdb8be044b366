"""Every field of a run's config in one table: its default, allowed values and meaning.

A config file is Python: its `get_config(arguments)` starts from `default()` and sets what differs. On the command line
`--config my.py:optimizer=shampoo` passes arguments to it, and `--config.batch_size=512` sets one field.

    from simplest_vit.config import default

    def get_config(arguments=None):
        config = default("muon")
        config.epochs = 30
        return config
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder

from simplest_vit.errors import UserError, did_you_mean
from simplest_vit.files import local_path
from simplest_vit.ranges import DECAY, FLAG, MODEL, TEXT, Values, integer, number, one_of, optional


class Field(NamedTuple):
    """A row of the table."""

    default: Any
    values: Values
    meaning: str
    needs: tuple[str, ...] = ()  # fields of which one must be on, else this one has no effect


def _is_interval(value: Any) -> bool:
    if isinstance(value, str):
        return bool(re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+) epochs?", value)) and 0 < float(value.split()[0]) < 1e6
    return integer(1).allows(value)


def interval_steps(interval: int | str, steps_per_epoch: int) -> int:
    """Convert an interval to steps: with 30 steps per epoch 100 -> 100, "1 epoch" -> 30, "0.5 epochs" -> 15."""
    if isinstance(interval, str):
        return max(1, round(float(interval.split()[0]) * steps_per_epoch))
    return interval


def _folder(path: Any) -> bool:
    return isinstance(path, str) and bool(path) and bool(local_path(path))  # which raises


_NAME = optional(TEXT)
_MIX = ("data.mixup_alpha", "data.cutmix_alpha")
INTERVAL = int | str
_INTERVAL = Values(_is_interval, "a number of steps, an integer from 1, or of epochs, such as '0.5 epochs'", INTERVAL)
_FOLDER = optional(Values(_folder, "the path of a folder"))

# Names, and ranges that depend on other fields, are checked by the functions that use them: `model_arguments`,
# `image_shape`, `create_optimizer`.
FIELDS = {
    "seed": Field(3407, integer(0, 2**32 - 1), "seed of initialization, example order, augmentation and dropout"),
    "epochs": Field(90.0, number("(0, 1e6]"), "passes over the training split"),
    "steps": Field(None, optional(integer(1)), "number of steps; None: computed from epochs"),
    "min_steps": Field(0, integer(0), "train for at least so many steps if they are computed from epochs"),
    "batch_size": Field(2048, integer(1), "examples in a step, over all devices"),
    "warmup_steps": Field(75, integer(0), "steps of linear learning-rate warm-up; a cosine decay to 0 follows"),
    "grad_clip": Field(1.0, number("[0, 1e9]"), "clip gradients to this global norm; 0: no clipping"),
    "weight_decay": Field(0.0, number("[0, 100]"), "weight decay of kernels; biases and LayerNorm do not decay"),
    # In both cases AdamW, LARS and other optimizers of optax that have a weight decay apply it in their own way.
    "decoupled_weight_decay": Field(False, FLAG, "False: L2, on the gradient; True: as in AdamW", ("weight_decay",)),
    "label_smoothing": Field(0.0, DECAY, "share of each label's weight that is spread evenly over all classes"),
    "max_skipped_steps": Field(10, integer(1), "stop after so many steps in a row with a loss or gradient not finite"),
    "fsdp": Field(1, integer(1), "devices that share one copy of parameters and optimizer state; 1: no sharing"),
    "distributed": Field(None, optional(one_of("auto")), "auto: connect processes of SLURM, MPI, Kubernetes or TPU"),
    "accumulation_steps": Field(1, integer(1), "micro-batches per step, to save memory; same result without dropout"),
    "compute_dtype": Field(
        "bfloat16",
        one_of("float32", "bfloat16"),
        "dtype of activations; parameters, softmax, logits, loss are float32",
    ),
    "eval_every": Field(240, _INTERVAL, "interval between evaluations"),
    "checkpoint_every": Field(
        240, _INTERVAL, "interval between checkpoints, which are also evaluated; a new best is saved as well"
    ),
    "checkpoint_minutes": Field(None, optional(number("(0, 1e6]")), "save at the next report after this many minutes"),
    "log_every": Field(24, _INTERVAL, "interval between reports of training loss, accuracy and speed"),
    "patience": Field(0, integer(0), "stop after this many evaluations in a row without a new best; 0: never"),
    "sam.rho": Field(0.0, number("[0, 100]"), "radius of sharpness-aware minimization (SAM); 0: off; reference: 0.05"),
    "sam.every": Field(1, integer(1), "use SAM in every n-th step", ("sam.rho",)),
    "ema.decay": Field(0.0, DECAY, "decay of the average parameters, which are evaluated; 0: off; reference: 0.99"),
    "ema.every": Field(5, integer(1), "steps between updates of the moving average", ("ema.decay",)),
    # In JAX_COMPILATION_CACHE_DIR, or ~/.cache/simplest_vit.
    "compilation_cache": Field(True, FLAG, "keep compiled accelerator programs on disk"),
    "wandb": Field(None, _NAME, "project of Weights & Biases that the run is logged to as well"),
    "profile.first_step": Field(0, integer(0), "profile the steps after this one; 0: no profile"),
    "profile.num_steps": Field(5, integer(1), "number of steps to profile", ("profile.first_step",)),
    "init_from": Field(None, _FOLDER, "fine-tune: start from the best weights of the run in this folder"),
    "model.name": Field("simplest_vit", TEXT, "network: simplest_vit, isometric_vit, shift_mlp or simple_vit"),
    "model.variant": Field("S", TEXT, "Ti, S, B or L; sets depth, width, num_heads and mlp_dim if they are None"),
    "model.depth": Field(None, optional(MODEL["depth"]), "number of blocks"),
    "model.width": Field(None, optional(MODEL["width"]), "channels of a token"),
    "model.num_heads": Field(None, optional(MODEL["num_heads"]), "number of attention heads; a divisor of the width"),
    "model.mlp_dim": Field(None, optional(MODEL["mlp_dim"]), "hidden channels of an MLP"),
    "model.patch_size": Field(4, MODEL["patch_size"], "side of a patch in pixels; a divisor of the image size"),
    "model.dropout": Field(0.0, MODEL["dropout"], "dropout rate of the activations in training"),
    "model.remat": Field(False, MODEL["remat"], "recompute blocks in the backward pass, to save memory"),
    "model.attention_kernel": Field(
        "auto",
        MODEL["attention_kernel"],
        "fused: attention of up to 64 tokens in one kernel (docs/gpu.md); auto: fused on GPUs that run it, else xla",
    ),
    # None leaves the choice to the network.
    "model.attention": Field(
        None,
        _NAME,
        "espa, espa_2d, espa_reference, uspa, shift, fixed_shift, spatial_shift, value_skipinit or softmax",
    ),
    "model.gamma_max_depth": Field(0.005, MODEL["gamma_max_depth"], "E-SPA: decay at the last block"),
    "model.rho_max_depth": Field(0.8, MODEL["rho_max_depth"], "U-SPA: correlation at the last block"),
    "model.uniform_fraction": Field(0.01, MODEL["uniform_fraction"], "shift attention: weight of uniform attention"),
    "model.identity_head_fraction": Field(
        0.75, MODEL["identity_head_fraction"], "shift attention: share of heads that start unshifted"
    ),
    "model.mlp": Field(None, _NAME, "MLP: tat, looks_linear (orthogonal at initialization) or plain"),
    "model.activation": Field(None, _NAME, "tailored_relu or relu for mlp='tat'; otherwise gelu, silu or relu"),
    "model.c_val_0_target": Field(0.9, MODEL["c_val_0_target"], "TAT: eta, the target of the C-map at 0"),
    "model.init": Field(
        None,
        _NAME,
        "espa_tat, reference (the reference's scale), orthogonal (all but queries and keys), pytorch or mimetic",
    ),
    "model.norm": Field(None, _NAME, "normalization: none, or layer_norm before attention, MLP and head"),
    "model.skip": Field(None, _NAME, "skips: none, residual (x + f(x)) or scaled ((x + f(x)) / sqrt 2)"),
    "data.name": Field(
        "digits", TEXT, "cifar10, cifar100, tiny_imagenet, imagenet, image_folder, digits or a set that TFDS prepared"
    ),
    "data.dir": Field(None, _FOLDER, "folder of prepared data sets; None: ~/tensorflow_datasets"),
    "data.manual_dir": Field(None, _FOLDER, "folder of the original files, if they are not downloaded"),
    "data.label": Field(None, _NAME, "label to learn, such as coarse_label; None: label, or the only one"),
    "data.train_split": Field("train", TEXT, "training split in TFDS's syntax, such as train[:45000]"),
    "data.validation_split": Field(None, _NAME, "such as train[45000:]; None: validation if it exists, else test"),
    "data.image_size": Field(None, optional(integer(1, 2**14)), "side in pixels; None: the original size, or 224"),
    "data.random_resized_crop": Field(False, FLAG, "crop and resize at random, as for ImageNet, on the host"),
    "data.crop_padding": Field(4, integer(0, 2**14), "pad the image by this many pixels and crop at random; 0: off"),
    "data.flip": Field(True, FLAG, "mirror a random half of the images"),
    "data.rand_augment.num_ops": Field(0, integer(0, 100), "RandAugment: operations per image; 0: off"),
    "data.rand_augment.magnitude": Field(10, integer(0, 30), "RandAugment: strength", ("data.rand_augment.num_ops",)),
    # z ~ Beta(alpha, alpha). With both, each batch draws one.
    "data.mixup_alpha": Field(0.0, number("[0, 1000]"), "mixup: the partner's weight is min(z, 1 - z); 0: off"),
    "data.cutmix_alpha": Field(0.0, number("[0, 1000]"), "CutMix: the share 1 - z of the area is pasted; 0: off"),
    "data.mixup_mode": Field("batch", one_of("batch", "example"), "one weight or box per batch, or per example", _MIX),
    "data.device_budget_bytes": Field(2 * 10**9, integer(0, 2**60), "bytes up to which a split is kept on the device"),
    # 0: threads instead; None: chosen by the number of cores.
    "data.num_workers": Field(None, optional(integer(0, 1024)), "processes that decode streamed images"),
    "optimizer.name": Field("adam", TEXT, "adam, muon, shampoo, soap, or the name of any other optax optimizer"),
    "optimizer.learning_rate": Field(1e-3, number("(0, 1000]"), "peak learning rate"),
}

INTERVALS = tuple(name for name, field in FIELDS.items() if field.values.kind == INTERVAL)

# An optimizer's own fields come from its signature (`optimizers.factory.declared`). optax does not check their values:
_OPTIMIZER_KINDS = {bool: FLAG, int: integer(-(2**31)), float: number("[-inf, inf]"), str: TEXT}
OPTIMIZER_RANGES = {
    **dict.fromkeys(("b1", "b2", "b3", "beta", "decay", "momentum", "adam_b1", "adam_b2"), DECAY),
    "eps": number("(0, 1]"),
    "adam_learning_rate": number("(0, 1000]"),
    "weight_decay": number("[0, 100]"),
    "ns_steps": integer(1, 100),
}


def fields(optimizer: str) -> dict[str, Field]:
    """Return the table with the settings of one optimizer, by dotted name."""
    from simplest_vit.optimizers.factory import declared  # imported here because it needs JAX

    own = {}
    for name, (value, kind) in declared(optimizer).items():
        if "shampoo" in optimizer or optimizer == "soap":  # they check their own
            values = Values(lambda value: True, "anything", kind)
        else:
            values = OPTIMIZER_RANGES.get(name, _OPTIMIZER_KINDS[kind])
            values = values if value is not None else optional(values)
        own[f"optimizer.{name}"] = Field(value, values, f"an argument of {optimizer}")
    return FIELDS | own


def default(optimizer: str = "adam") -> ConfigDict:
    """Create a config with all defaults, which a recipe then changes.

    The optimizer determines the fields of `config.optimizer`; a UserError if there is none of that name.
    """
    nested: dict[str, Any] = {}
    for name, (value, values, *_) in (fields(optimizer) | {"optimizer.name": Field(optimizer, TEXT, "")}).items():
        *sections, last = name.split(".")
        section = nested
        for part in sections:
            section = section.setdefault(part, {})
        if value is not None and values.kind == INTERVAL:
            value = FieldReference(value, field_type=INTERVAL)
        section[last] = placeholder(values.kind) if value is None else value
    return ConfigDict(nested)


def parse_arguments(arguments: str | None, **choices: str | tuple[str, ...]) -> dict[str, str]:
    """Parse the `key=value,key=value` after a config file's colon.

    Args:
      **choices: The allowed values of each key, the default first; only the default if any value is allowed.

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
            raise UserError(f"config argument {key}={value} is unknown; expected one of {', '.join(options[key])}")
        chosen[key] = value
    return chosen


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested dict to dotted names: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def from_settings(settings: dict[str, Any], image_shape: tuple[int, int, int]) -> ConfigDict:
    """Create a config from nested dicts, as stored in a run's folder, and `check` it for images of this shape."""
    flat = flatten(settings)
    config = default(str(flat.get("optimizer.name", "adam")))
    with config.ignore_type():
        config.update_from_flattened_dict(flat)
    check(config, image_shape)
    return config


def suggest(name: str, table: Iterable[str] | None = None) -> str:
    """Suggest the intended field for an unknown name: learning_rate -> config.optimizer.learning_rate."""
    names = [*(FIELDS if table is None else table)]
    known = {each: each for each in names} | {each.rsplit(".", 1)[-1]: each for each in reversed(names)}
    otherwise = "the fields are in simplest_vit/config.py"
    return did_you_mean(name.rsplit(".", 1)[-1], known, otherwise, lambda near: f"config.{known[near]}")


def _optimizer_fields(names: Iterable[str]) -> set[str]:
    return {name for name in names if name.startswith("optimizer.")}


def check(config: ConfigDict, image_shape: tuple[int, int, int] | None = None) -> None:
    """Check everything that can be checked without the data; `cli.run` does so once, before anything else.

    Args:
      image_shape: (H, W, C) of a preprocessed image; None for that of the data set, which must then exist.

    Raises:
      UserError: If a field is missing, unknown or has a value that is not allowed; the message names both.
    """
    from simplest_vit.data import dataset
    from simplest_vit.models import model_arguments
    from simplest_vit.optimizers.factory import create_optimizer, optimizers

    flat = flatten(config.to_dict())
    table = fields(str(flat.get("optimizer.name", "adam")))
    optimizer = flat.get("optimizer.name")
    settings = _optimizer_fields(flat)
    if settings != _optimizer_fields(table) and any(
        settings == _optimizer_fields(fields(other)) for other in optimizers()
    ):
        raise UserError(
            f"config.optimizer.name={optimizer} does not fit its other settings, which are those of another optimizer; "
            f"choose it after the config file: --config FILE:optimizer={optimizer}, or in one of your own by "
            f'default("{optimizer}")'
        )
    for name in flat:
        if name not in table:
            raise UserError(f"config.{name} is unknown; {suggest(name, table)}")
    for name, (value, values, meaning, _) in table.items():
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
    model_arguments(**config.model, image_shape=image_shape or dataset.image_shape(config.data))
    create_optimizer(**config.optimizer)
