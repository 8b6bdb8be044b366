"""Networks by name, and the construction of a network from the fields of `config.model`."""

import math
import re
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplest_vit.errors import UserError, did_you_mean
from simplest_vit.models import attention_kinds, fused_attention, tat
from simplest_vit.models.initializers import INITS
from simplest_vit.models.layers import NORMS, token_grid
from simplest_vit.models.mlp import MLPS
from simplest_vit.models.vit import SKIPS, ViT
from simplest_vit.ranges import MODEL, integer

_ISOMETRIC = {"attention": "shift", "mlp": "looks_linear", "init": "orthogonal", "norm": "none", "skip": "none"}
# The parts of each network; fields of the config that are not None override them.
PRESETS: dict[str, dict[str, Any]] = {
    "simplest_vit": {"attention": "espa", "mlp": "tat", "init": "espa_tat", "norm": "none", "skip": "none"},
    "isometric_vit": _ISOMETRIC,
    "shift_mlp": _ISOMETRIC | {"attention": "spatial_shift"},
    # As in the PyTorch reference, which uses PyTorch's default initialization.
    "simple_vit": {
        "attention": "softmax",
        "mlp": "plain",
        "init": "pytorch",
        "norm": "layer_norm",
        "skip": "residual",
        "output_projection": True,
    },
}

# The usual sizes of vision transformers (arXiv 2010.11929, 2012.12877).
VARIANTS = {
    "Ti": {"depth": 12, "width": 192, "num_heads": 3, "mlp_dim": 768},
    "S": {"depth": 12, "width": 384, "num_heads": 6, "mlp_dim": 1536},
    "B": {"depth": 12, "width": 768, "num_heads": 12, "mlp_dim": 3072},
    "L": {"depth": 24, "width": 1024, "num_heads": 16, "mlp_dim": 4096},
}
# Fields that choose a part of a network, and their values.
_CHOICES: dict[str, Collection[str]] = {
    "attention": attention_kinds.KINDS,
    "mlp": MLPS,
    "init": INITS,
    "norm": NORMS,
    "skip": SKIPS,
}


def _one_of(field: str, value: Any, choices: Collection[str]) -> Any:
    if value not in choices:
        raise UserError(f"config.model.{field}={value!r} is unknown; expected one of {', '.join(choices)}")
    return value


def model_arguments(
    name: str, *, image_shape: tuple[int, int, int], variant: str = "S", patch_size: int = 4, **fields: Any
) -> dict[str, Any]:
    """Resolve preset and variant, and check every field.

    Args:
      name: One of `PRESETS`.
      image_shape: Height, width and channels.
      variant: One of `VARIANTS`; determines the sizes that are None.
      **fields: Other fields of `config.model`; None keeps the preset's choice.

    Returns:
      The arguments of `ViT` except `image_shape`, `num_classes`, `dtype` and `rngs`. Fields that this network does not
      use are left out.

    Raises:
      UserError: If a name is unknown, a value is not allowed, or sizes do not fit.
    """
    defaults = VARIANTS[_one_of("variant", variant, VARIANTS)] | PRESETS[_one_of("name", name, PRESETS)]
    known = {*MODEL, *_CHOICES, "activation"}
    for field in fields:
        if field not in known:
            raise UserError(f"config.model.{field} is unknown; {did_you_mean(field, known, 'remove it')}")
    if len(image_shape) != 3 or not all(map(integer(1).allows, image_shape)):
        raise UserError(f"image_shape={image_shape!r} must be three positive integers (height, width, channels)")
    plain = {field: x.item() if isinstance(x, np.generic) else x for field, x in fields.items()}
    given = {field: value for field, value in plain.items() if value is not None}
    for field, value in (given | {"patch_size": patch_size}).items():
        if field in MODEL and not MODEL[field].allows(value):
            raise UserError(f"config.model.{field}={value!r} must be {MODEL[field].expected}")
    arguments: dict[str, Any] = {field: given.get(field, value) for field, value in defaults.items()}
    arguments |= {"patch_size": patch_size, "dropout": given.get("dropout", 0.0), "remat": given.get("remat", False)}
    for field, choices in _CHOICES.items():
        _one_of(field, arguments[field], choices)
    mlp = MLPS[arguments["mlp"]]
    arguments["activation"] = _one_of("activation", given.get("activation", mlp.activations[0]), mlp.activations)

    height, width_pixels, _ = image_shape
    if height % patch_size or width_pixels % patch_size:
        raise UserError(
            f"config.model.patch_size={patch_size} does not divide the image size {height} x {width_pixels}; "
            "choose a divisor or change config.data.image_size"
        )
    grid = token_grid(image_shape, patch_size)
    width, num_heads = arguments["width"], arguments["num_heads"]
    if width % num_heads:
        raise UserError(
            f"config.model.width={width} is not divisible by config.model.num_heads={num_heads}; change one of them"
        )
    if width % 4 or width < 8:
        raise UserError(
            f"config.model.width={width} must be a multiple of 4 and at least 8 (the position embedding has four parts)"
        )
    mlp.check(width, arguments["mlp_dim"])
    settings = {field: given[field] for field in attention_kinds.settings_of(arguments["attention"]) if field in given}
    kind = attention_kinds.KINDS[arguments["attention"]](**settings)
    kind.check(grid, num_heads)
    if INITS[arguments["init"]].attention and (kind.zero_queries or "output_projection" not in arguments):
        raise UserError(
            f"config.model.init={arguments['init']!r} needs random queries and an output projection; use it with "
            "config.model.name='simple_vit' and attention='softmax'"
        )
    arguments |= settings
    if kind.has_queries and kind.has_values:
        # `auto` means `xla` here; callers that know the devices call `fused_attention.choose` first.
        arguments["attention_kernel"] = "fused" if given.get("attention_kernel") == "fused" else "xla"
        if arguments["attention_kernel"] == "fused":
            fused_attention.check_sizes(math.prod(grid), width // num_heads)
    if arguments["activation"] == "tailored_relu":
        arguments["c_val_0_target"] = given.get("c_val_0_target", 0.9)
        tat.solve_negative_slope(2 * arguments["depth"], arguments["c_val_0_target"])  # raises if there is none
    return arguments


def create_model(
    name: str,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    variant: str = "S",
    dtype: jnp.dtype = jnp.float32,
    rngs: nnx.Rngs,
    **fields: Any,
) -> ViT:
    """Create a network with float32 parameters.

    Args:
      name: One of `PRESETS`.
      image_shape: Height, width and channels.
      variant: One of `VARIANTS`, with or without the patch size: "S" or "S/4".
      dtype: Of the computation.
      **fields: Other fields of `config.model`, which override the preset's and the variant's.

    Raises:
      UserError: See `model_arguments`.
    """
    if sized := re.fullmatch(r"(\w+)/(\d+)", variant):
        variant, fields = sized[1], {"patch_size": int(sized[2])} | fields
    if not integer(1).allows(num_classes):
        raise UserError(f"num_classes={num_classes!r} must be a positive integer")
    arguments = model_arguments(name, image_shape=image_shape, variant=variant, **fields)
    return ViT(image_shape=image_shape, num_classes=num_classes, dtype=dtype, rngs=rngs, **arguments)
