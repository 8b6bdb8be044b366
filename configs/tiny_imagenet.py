"""SimplEsT-ViT-S/8 or SimpleViT-S/8 on TinyImageNet-200 (64 px): 90 epochs of batches of 2048 (4,320 steps).

The reference's top-1 validation accuracy (augmentation basic / strong):

    model=simplest_vit, Adam         38.47 / 39.66 %
    model=simplest_vit, Shampoo@25   42.08 / 44.90 %
    model=simple_vit, Adam           45.29 / 51.52 %

    python main.py --config configs/tiny_imagenet.py:augmentation=basic,model=simplest_vit --workdir runs/tiny_imagenet
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arguments: str | None = None) -> ConfigDict:
    """Return the config; arguments as in `common.small_data`."""
    config = common.small_data(arguments)
    config.data.name = "tiny_imagenet"
    config.model.patch_size = 8
    config.eval_every = config.checkpoint_every = 480
    return config
