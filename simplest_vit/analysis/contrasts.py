"""The models that explain the method, each one step away from it."""

import copy
from typing import Any

# Name -> what differs in `config.model`.
CONTRASTS: dict[str, dict[str, str]] = {
    "E-SPA + TAT": {"name": "simplest_vit", "attention": "espa", "activation": "tailored_relu"},
    "vanilla, unshaped": {"name": "simplest_vit", "attention": "unshaped", "activation": "relu"},
    "E-SPA, ReLU": {"name": "simplest_vit", "attention": "espa", "activation": "relu"},
    "U-SPA + TAT": {"name": "simplest_vit", "attention": "uspa", "activation": "tailored_relu"},
    "Value-SkipInit + TAT": {"name": "simplest_vit", "attention": "value_skipinit", "activation": "tailored_relu"},
    "SimpleViT": {"name": "simple_vit"},
    "reference's bias + TAT": {
        "name": "simplest_vit",
        "attention": "espa_reference",
        "activation": "tailored_relu",
    },
}


def name_of(model: Any) -> str:
    """The name in `CONTRASTS` of a `config.model`, or one made of its fields."""
    for name, fields in CONTRASTS.items():
        if all(model[field] == value for field, value in fields.items()):
            return name
    return f"{model.attention}, {model.activation}"


def with_contrast(config: Any, name: str) -> Any:
    """A copy of `config` whose model is the contrast `name`, of the same sizes."""
    config = copy.deepcopy(config)
    config.model.update(CONTRASTS[name])
    return config
