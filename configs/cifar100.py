"""ViT-S/4 on CIFAR-100: 90 epochs of batches of 2048 (2,160 steps).

Top-1 validation accuracy of the reference, augmentation basic / strong:

    simplest_vit, adam          46.87 / 47.76 %
    simplest_vit, shampoo@25    55.06 / 58.99 %
    simple_vit, adam            58.80 / 64.39 %

    python main.py --config configs/cifar100.py:model=simplest_vit,optimizer=shampoo --workdir runs/cifar100
"""

from ml_collections import ConfigDict

from simplest_vit.recipes import common


def get_config(arguments: str | None = None) -> ConfigDict:
    """Return the config; arguments as in `common.start`."""
    config = common.start(arguments)
    config.data.name = "cifar100"
    config.epochs = 90
    config.batch_size = 2048
    config.warmup_steps = 75
    config.weight_decay = 5e-5
    config.grad_clip = 1.0
    config.eval_every = config.checkpoint_every = "10 epochs"
    config.log_every = "1 epoch"
    config.compute_dtype = "bfloat16"

    config.model.variant = "S"
    config.model.patch_size = 4

    config.data.crop_padding = 4
    config.data.flip = True
    return config
