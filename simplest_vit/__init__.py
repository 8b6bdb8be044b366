"""Deep vision transformers without normalization and without skip connections, and Shampoo and SOAP for optax.

    import simplest_vit

    results = simplest_vit.train(config, "runs/mine")  # as `simplest-vit train` does
    predictor = simplest_vit.load("runs/mine")
    predictor.predict(["photo.jpg"])
    model = simplest_vit.create_model(
        "isometric_vit", variant="S/4", image_shape=(32, 32, 3), num_classes=10, rngs=nnx.Rngs(0)
    )
    tx = simplest_vit.soap(learning_rate=3e-3)

Names are imported on first use, so that the optimizers need only jax, numpy and optax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simplest_vit.api import train
    from simplest_vit.config import default as default_config
    from simplest_vit.models import create_model
    from simplest_vit.optimizers.shampoo import shampoo, soap
    from simplest_vit.predict import Predictor, load

__version__ = "0.3.0"
__all__ = ["Predictor", "create_model", "default_config", "load", "shampoo", "soap", "train"]

_HOMES = {
    "Predictor": ("predict", "Predictor"),
    "create_model": ("models", "create_model"),
    "default_config": ("config", "default"),
    "load": ("predict", "load"),
    "shampoo": ("optimizers.shampoo", "shampoo"),
    "soap": ("optimizers.shampoo", "soap"),
    "train": ("api", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
