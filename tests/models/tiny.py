"""Small models for the tests."""

from flax import nnx

from simplest_vit.models import ViT, create_model
from simplest_vit.models.layers import Constant

# Two by three patches: nothing is square, so that swapped axes show.
SIZES = {
    "image_shape": (8, 12, 3),
    "num_classes": 5,
    "patch_size": 4,
    "depth": 3,
    "width": 16,
    "num_heads": 2,
    "mlp_dim": 32,
    "c_val_0_target": 0.5,
}


def vit(name: str = "simplest_vit", **overrides) -> ViT:
    """Create a tiny model of a preset."""
    return create_model(name, **{**SIZES, "rngs": nnx.Rngs(0), **overrides})


def split(model: nnx.Module):
    """Graph definition, parameters and constants, the latter two as pure nested dicts."""
    graphdef, params, constants = nnx.split(model, nnx.Param, Constant)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(constants)
