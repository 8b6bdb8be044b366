r"""ViT-S/16 on ImageNet-1k (224 px): 90 epochs of batches of 1024 (112,590 steps).

Top-1 validation accuracy of the reference with augmentation basic / strong:

    simplest_vit, shampoo@25    70.53 / 70.71 %

    python main.py --config configs/imagenet.py:optimizer=shampoo,augmentation=strong --workdir runs/imagenet \
        --config.data.manual_dir=TARS
"""

from ml_collections import ConfigDict

from simplest_vit.recipes import common


def get_config(arguments: str | None = None) -> ConfigDict:
    """Return the config; arguments as in `common.start`."""
    config = common.start(arguments)
    config.data.name = "imagenet"
    config.epochs = 90
    config.batch_size = 1024
    config.warmup_steps = 10_000
    config.weight_decay = 1e-5
    config.grad_clip = 1.0
    config.eval_every = config.checkpoint_every = "1 epoch"
    config.log_every = 100
    config.compute_dtype = "bfloat16"
    if config.optimizer.name in ("adam", "shampoo", "reference_shampoo"):
        config.optimizer.learning_rate = 3e-4

    config.model.variant = "S"
    config.model.patch_size = 16

    config.data.image_size = 224
    config.data.random_resized_crop = True
    config.data.crop_padding = 0
    config.data.flip = True
    return config
