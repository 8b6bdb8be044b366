"""Conversion between the reference's state dict and the parameters and constants of a model here."""

from typing import Any

import numpy as np
from flax import traverse_util

from simplest_vit.errors import UserError
from simplest_vit.interop.torch_file import Checkpoint
from simplest_vit.models import PRESETS, reference_layout
from simplest_vit.models.layers import sincos_position_embedding, token_grid
from simplest_vit.models.mlp import MLPS
from simplest_vit.training.state import ModelState

# Networks of the reference, and the kinds of attention whose parameters and constants are those of its checkpoints.
_ATTENTIONS = {
    "simplest_vit": ("espa", "espa_causal", "espa_2d", "espa_reference", "uspa"),
    "simple_vit": ("softmax",),
}


def _flat(state: ModelState) -> dict[str, Any]:
    """Return parameters and constants by path, such as `blocks/mlp/dense1/kernel`."""
    return traverse_util.flatten_dict(state.params, sep="/") | traverse_util.flatten_dict(state.constants, sep="/")


def _tensors(model: Any, flat: dict[str, Any]) -> list[reference_layout.Tensor]:
    """List the tensors of a model of the reference, which has two networks and few of our choices."""
    if model.name not in _ATTENTIONS:
        networks = ", ".join(_ATTENTIONS)
        raise UserError(f"config.model.name={model.name!r} is not in the PyTorch reference; expected {networks}")
    preset = PRESETS[model.name]
    own = {"activation": MLPS[preset["mlp"]].activations[0], **preset}
    allowed = {field: (own[field],) for field in ("mlp", "activation", "norm", "skip")}
    for field, values in (allowed | {"attention": _ATTENTIONS[model.name]}).items():
        if model[field] not in (None, *values):
            expected = ", ".join(values)
            raise UserError(
                f"config.model.{field}={model[field]!r} is not in the PyTorch reference; expected {expected}"
            )
    return list(reference_layout.tensors(flat, flat["blocks/mlp/dense1/kernel"].shape[0], model.patch_size))


def to_reference(model: Any, state: ModelState) -> dict[str, np.ndarray]:
    """Convert a model to the names and layouts of the reference.

    Args:
      model: `config.model`.
      state: The model.

    Returns:
      float32 arrays by the names of the reference's state dict.

    Raises:
      UserError: If the reference has no such model.
    """
    flat = {path: np.asarray(leaf) for path, leaf in _flat(state).items()}
    return {t.name: np.ascontiguousarray(t.there(*t.arrays(flat))) for t in _tensors(model, flat)}


def from_reference(
    model: Any, abstract: ModelState, checkpoint: Checkpoint, image_shape: tuple[int, int, int]
) -> tuple[Any, Any]:
    """Read the parameters and constants of a model from a checkpoint of the reference.

    Args:
      model: `config.model`.
      abstract: Shapes, from `Run.abstract`.
      checkpoint: The file.
      image_shape: Height, width and channels.

    Returns:
      Parameters and constants as nested dicts of float32 arrays. The constants of E-SPA are those of the file.

    Raises:
      UserError: If a tensor is missing, superfluous or of another shape.
    """
    shapes = _flat(abstract)
    expected = {t.name: t for t in _tensors(model, shapes)}
    superfluous = [name for name in checkpoint.tensors if name not in expected]
    if superfluous:
        raise _mismatch(checkpoint, f"holds {superfluous[0]}, which a {model.name} of this config has not")
    arrays = {path: np.empty(leaf.shape, np.float32) for path, leaf in shapes.items()}
    for name, tensor in expected.items():
        parts = tensor.arrays(arrays)
        shape = tensor.there(*parts).shape
        if name not in checkpoint.tensors:
            raise _mismatch(checkpoint, f"lacks {name} {list(shape)}")
        found = checkpoint.tensors[name].shape
        if found != shape:
            raise _mismatch(checkpoint, f"has {name} {list(found)}, expected {list(shape)}")
        for part, array in zip(parts, tensor.here(checkpoint[name]), strict=True):
            part[...] = array
    grid = token_grid(image_shape, model.patch_size)
    arrays["position_embedding"] = sincos_position_embedding(grid, shapes["position_embedding"].shape[1])
    return tuple(
        traverse_util.unflatten_dict({path: arrays[path] for path in traverse_util.flatten_dict(tree, sep="/")}, "/")
        for tree in (abstract.params, abstract.constants)
    )


def _mismatch(checkpoint: Checkpoint, reason: str) -> UserError:
    return UserError(
        f"--checkpoint={checkpoint.path} {reason}; set config.model (name, depth, width, mlp_dim, patch_size) and "
        "config.data to what it was trained with"
    )
