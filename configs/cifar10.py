"""ViT-S/4 on CIFAR-10: 90 epochs of batches of 2048 (2,160 steps).

Top-1 validation accuracy, augmentation basic / strong:

    model           optimizer    reference          here (one seed, RESULTS.md)
    simplest_vit    adam         79.36 / 78.94 %
    simplest_vit    shampoo@25   82.43 / 84.96 %    82.69 %
    simple_vit      adam         83.34 / 87.33 %
    simple_vit      soap                            85.98 %
    isometric_vit   soap                            87.55 % (with an earlier setting: one of six heads in place)

The reference's E-SPA and its scale of orthogonal kernels deviate from the papers: see `model.attention` and
`model.init` in `simplest_vit/config.py`.

    python main.py --config configs/cifar10.py:model=simplest_vit,optimizer=shampoo --workdir runs/cifar10

The data are downloaded (170 MB), or read from `cifar-10-batches-bin/` in the folder `--config.data.manual_dir`.
"""

from ml_collections import ConfigDict

from simplest_vit.recipes import common


def get_config(arguments: str | None = None) -> ConfigDict:
    """Return the config; arguments as in `common.start`."""
    config = common.start(arguments)
    config.data.name = "cifar10"
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
