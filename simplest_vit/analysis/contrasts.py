"""The models that explain the method, each one step away from it."""

import copy
from typing import Any


def _simplest(attention: str, mlp: str, activation: str, init: str = "paper") -> dict[str, str]:
    return {"name": "simplest_vit", "attention": attention, "mlp": mlp, "activation": activation, "init": init}


# Name -> what differs in `config.model`.
CONTRASTS: dict[str, dict[str, str]] = {
    "E-SPA + TAT": _simplest("espa", "shaped", "tailored_relu"),
    "isometric": _simplest("shift", "mirrored", "gelu", "isometric"),
    "vanilla, unshaped": _simplest("unshaped", "shaped", "relu"),
    "E-SPA, ReLU": _simplest("espa", "shaped", "relu"),
    "U-SPA + TAT": _simplest("uspa", "shaped", "tailored_relu"),
    "Value-SkipInit + TAT": _simplest("value_skipinit", "shaped", "tailored_relu"),
    "SimpleViT": {"name": "simple_vit"},
    "reference's bias + TAT": _simplest("espa_reference", "shaped", "tailored_relu"),
}


def name_of(model: Any) -> str:
    """The name in `CONTRASTS` of a `config.model`, or one made of its fields."""
    for name, fields in CONTRASTS.items():
        if all(model[field] == value for field, value in fields.items()):
            return name
    return f"{model.attention}, {model.mlp} MLP, {model.activation}, init {model.init}"


def with_contrast(config: Any, name: str) -> Any:
    """A copy of `config` whose model is the contrast `name`, of the same sizes."""
    config = copy.deepcopy(config)
    config.model.update(CONTRASTS[name])
    return config
