"""ViT-S/8 on TinyImageNet-200 (64 px): 90 epochs of batches of 2048 (4,320 steps).

Top-1 validation accuracy of the reference, augmentation basic / strong:

    simplest_vit, adam          38.47 / 39.66 %
    simplest_vit, shampoo@25    42.08 / 44.90 %
    simple_vit, adam            45.29 / 51.52 %

    python main.py --config configs/tiny_imagenet.py:model=simplest_vit,optimizer=shampoo --workdir runs/tiny_imagenet
"""

from ml_collections import ConfigDict

from simplest_vit.recipes import common


def get_config(arguments: str | None = None) -> ConfigDict:
    """Return the config; arguments as in `common.start`."""
    config = common.start(arguments)
    config.data.name = "tiny_imagenet"
    config.epochs = 90
    config.batch_size = 2048
    config.warmup_steps = 75
    config.weight_decay = 5e-5
    config.grad_clip = 1.0
    config.eval_every = config.checkpoint_every = "10 epochs"
    config.log_every = "0.5 epochs"
    config.compute_dtype = "bfloat16"

    config.model.variant = "S"
    config.model.patch_size = 8

    config.data.crop_padding = 4
    config.data.flip = True
    return config
