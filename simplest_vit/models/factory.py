"""From `config.model` to a model."""

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx

from simplest_vit.errors import UserError
from simplest_vit.models import attention, espa, simplest_vit, tat
from simplest_vit.models.layers import token_grid
from simplest_vit.models.simple_vit import SimpleViT
from simplest_vit.models.simplest_vit import SimplestViT

MODELS = {"simplest_vit": SimplestViT, "simple_vit": SimpleViT}

# The usual sizes of vision transformers (arXiv 2010.11929, 2012.12877).
VARIANTS = {
    "Ti": {"depth": 12, "width": 192, "num_heads": 3, "mlp_dim": 768},
    "S": {"depth": 12, "width": 384, "num_heads": 6, "mlp_dim": 1536},
    "B": {"depth": 12, "width": 768, "num_heads": 12, "mlp_dim": 3072},
    "L": {"depth": 24, "width": 1024, "num_heads": 16, "mlp_dim": 4096},
}


def _one_of(field: str, value: Any, choices: Any) -> None:
    if value not in choices:
        raise UserError(f"config.{field}={value!r} is unknown; expected one of {', '.join(choices)}")


def _shaping(config: Any) -> list[str]:
    """The fields of `config.model` by which a SimplEsT-ViT is shaped, less those that its own choice does not read."""
    names = ["attention", "mlp", "activation", "init"]
    if config.attention == "uspa":
        names.append("rho_max_depth")
    elif config.attention in espa.FORMS:
        names.append("gamma_max_depth")
    elif config.attention in ("shift", "fixed_shift"):
        names += ["shift_eps", "shift_in_place"]
    if config.activation == "tailored_relu":
        names.append("c_val_0_target")
    return names


def model_arguments(config: Any, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Resolve the variant and check every field of `config.model` that depends on another or on the image.

    Args:
      config: `config.model`, whose values are in the ranges of `config.FIELDS`. Where `depth`, `width`, `num_heads` or
        `mlp_dim` is None, the variant decides.
      image_shape: Height, width and channels.

    Returns:
      Keyword arguments of the model, less `image_shape`, `num_classes`, `dtype` and `rngs`.

    Raises:
      UserError: If a name is unknown or sizes do not fit.
    """
    _one_of("model.name", config.name, MODELS)
    _one_of("model.variant", config.variant, VARIANTS)
    sizes = {name: size if config[name] is None else config[name] for name, size in VARIANTS[config.variant].items()}
    height, width_pixels, _ = image_shape
    if height % config.patch_size or width_pixels % config.patch_size:
        raise UserError(
            f"config.model.patch_size={config.patch_size} does not divide the image size {height} x {width_pixels}; "
            "choose a divisor or change config.data.image_size"
        )
    num_tokens = math.prod(token_grid(image_shape, config.patch_size))
    width = sizes["width"]
    if width % sizes["num_heads"]:
        raise UserError(
            f"config.model.width={width} is not divisible by config.model.num_heads={sizes['num_heads']}; "
            "change one of them"
        )
    if width % 4 or width < 8:
        raise UserError(
            f"config.model.width={width} must be a multiple of 4 and at least 8 (the position embedding has four parts)"
        )
    arguments = {**sizes, "patch_size": config.patch_size, "dropout": config.dropout, "remat": config.remat}
    # `auto` is XLA's form here; `training.run.build` knows the devices, and may have chosen the kernel.
    arguments["attention_kernel"] = "fused" if config.attention_kernel == "fused" else "xla"
    if arguments["attention_kernel"] == "fused":
        attention.check_sizes(num_tokens, width // sizes["num_heads"])
    if config.name == "simplest_vit":
        _one_of("model.attention", config.attention, simplest_vit.ATTENTIONS)
        _one_of("model.mlp", config.mlp, simplest_vit.MLPS)
        _one_of("model.activation", config.activation, simplest_vit.MLPS[config.mlp])
        _one_of("model.init", config.init, simplest_vit.INITS)
        if config.attention in ("shift", "fixed_shift") and sizes["num_heads"] > num_tokens:
            raise UserError(
                f"config.model.num_heads={sizes['num_heads']} must be at most the {num_tokens} tokens, for shift "
                "attention has an offset for each head; choose fewer heads or a smaller config.model.patch_size"
            )
        if config.mlp == "mirrored" and (sizes["mlp_dim"] % 2 or sizes["mlp_dim"] < 2 * width):
            raise UserError(
                f"config.model.mlp_dim={sizes['mlp_dim']} must be even and at least {2 * width}, twice the width, for "
                "a mirrored MLP"
            )
        arguments |= {name: config[name] for name in _shaping(config)}
        if config.activation == "tailored_relu":
            try:
                tat.solve_negative_slope(2 * sizes["depth"], config.c_val_0_target)
            except ValueError as error:
                raise UserError(f"config.model.{error}") from error
    return arguments


def create_model(
    config: Any, *, image_shape: tuple[int, int, int], num_classes: int, dtype: jnp.dtype, rngs: nnx.Rngs
) -> SimplestViT | SimpleViT:
    """Create the model that `config.model` describes, with float32 parameters.

    Args:
      config: `config.model`.
      image_shape: Height, width and channels.
      num_classes: Number of classes.
      dtype: Compute dtype.
      rngs: Streams for the initialization.

    Returns:
      The model.

    Raises:
      UserError: See `model_arguments`.
    """
    arguments = model_arguments(config, image_shape)
    return MODELS[config.name](image_shape=image_shape, num_classes=num_classes, dtype=dtype, rngs=rngs, **arguments)
