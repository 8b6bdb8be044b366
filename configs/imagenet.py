r"""SimplEsT-ViT-S/16 or SimpleViT-S/16 on ImageNet-1k (224 px): 90 epochs of batches of 1024 (112,590 steps).

The reference's top-1 validation accuracy: SimplEsT-ViT with Shampoo@25 70.53 % (basic augmentation), 70.71 % (strong).

    python main.py --config configs/imagenet.py:augmentation=strong --workdir runs/imagenet \
        --config.data.manual_dir=TARS
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arguments: str | None = None) -> ConfigDict:
    """Return the config; arguments as in `common.small_data`."""
    config = common.small_data(arguments)
    config.data.name = "imagenet"
    config.batch_size = 1024
    config.warmup_steps = 10_000
    config.weight_decay = 1e-5
    if config.optimizer.name in ("adam", "shampoo"):
        config.optimizer.learning_rate = 3e-4
    config.data.image_size = 224
    config.data.random_resized_crop = True
    config.data.crop_padding = 0
    config.model.patch_size = 16
    config.eval_every = config.checkpoint_every = 1251
    config.log_every = 100
    return config
