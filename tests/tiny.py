"""A run small enough for a test: two blocks on the bundled digits."""

from typing import Any

from ml_collections import ConfigDict

from configs import digits
from simplest_vit.data.dataset import DatasetInfo

# What a run must know of digits.
DIGITS = DatasetInfo(
    name="digits",
    version="1.0.0",
    description="",
    train_split="train",
    validation_split="validation",
    train_size=1437,
    validation_size=360,
    class_names=tuple("0123456789"),
    image_shape=(8, 8, 1),
    eval_resize=8,
    mean=(0.3058,),
    std=(0.3761,),
    fingerprint="",
)


def tiny_config(arguments: str = "optimizer=adam", **overrides: Any) -> ConfigDict:
    """Digits, E-SPA and TAT, with a tiny model and six steps; `overrides` by dotted name, with "__" for the dot."""
    config = digits.get_config(f"model=simplest_vit,{arguments}")
    tiny = {
        "steps": 6,
        "batch_size": 64,
        "warmup_steps": 2,
        "eval_every": 3,
        "checkpoint_every": 3,
        "log_every": 2,
        "model.depth": 2,
        "model.width": 16,
        "model.num_heads": 2,
        "model.mlp_dim": 32,
        "model.c_val_0_target": 0.3,
    }
    config.update_from_flattened_dict(tiny | {name.replace("__", "."): value for name, value in overrides.items()})
    return config
