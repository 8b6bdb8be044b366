"""The models that explain the method, each one step away from it."""

import copy
from typing import Any

from simplest_vit.config import METHODS


def _simplest(method: str = "espa_tat", **fields: str) -> dict[str, str]:
    return {"name": "simplest_vit", **METHODS[method], **fields}


# Name -> what differs in `config.model`.
CONTRASTS: dict[str, dict[str, str]] = {
    "E-SPA + TAT": _simplest(),
    "isometric": _simplest("isometric"),
    "vanilla, unshaped": _simplest(attention="unshaped", activation="relu"),
    "E-SPA, ReLU": _simplest(activation="relu"),
    "U-SPA + TAT": _simplest(attention="uspa"),
    "Value-SkipInit + TAT": _simplest(attention="value_skipinit"),
    "SimpleViT": {"name": "simple_vit"},
    "reference's bias + TAT": _simplest(attention="espa_reference"),
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
