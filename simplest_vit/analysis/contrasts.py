"""The networks that explain the method, each one step away from it."""

import copy
from typing import Any

# Name -> fields of `config.model`; fields of `_CHOICES` that are absent are the network's own.
CONTRASTS: dict[str, dict[str, str]] = {
    "E-SPA + TAT": {"name": "simplest_vit"},
    "isometric": {"name": "isometric_vit"},
    "vanilla, unshaped": {"name": "simplest_vit", "attention": "softmax", "activation": "relu"},
    "E-SPA, ReLU": {"name": "simplest_vit", "activation": "relu"},
    "U-SPA + TAT": {"name": "simplest_vit", "attention": "uspa"},
    "Value-SkipInit + TAT": {"name": "simplest_vit", "attention": "value_skipinit"},
    "SimpleViT": {"name": "simple_vit"},
    "reference's bias + TAT": {"name": "simplest_vit", "attention": "espa_reference"},
}
_CHOICES = ("attention", "mlp", "activation", "init", "norm", "skip")


def name_of(model: Any) -> str:
    """Return the name in `CONTRASTS` of a `config.model`, or one made of its fields."""
    chosen = {field: model[field] for field in ("name", *_CHOICES) if model[field] is not None}
    names = [name for name, fields in CONTRASTS.items() if fields == chosen]
    return names[0] if names else ", ".join(chosen.values())


def with_contrast(config: Any, name: str) -> Any:
    """Return a copy of `config` whose network is the contrast `name`, of the same sizes."""
    config = copy.deepcopy(config)
    config.model.update(dict.fromkeys(_CHOICES) | CONTRASTS[name])
    return config
