"""SimplEsT-ViT-S/4 or SimpleViT-S/4 on CIFAR-100: 90 epochs of batches of 2048 (2,160 steps).

The reference's top-1 validation accuracy (augmentation basic / strong):

    model=simplest_vit, Adam         46.87 / 47.76 %
    model=simplest_vit, Shampoo@25   55.06 / 58.99 %
    model=simple_vit, Adam           58.80 / 64.39 %

    python main.py --config configs/cifar100.py:optimizer=adam --workdir runs/cifar100
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arguments: str | None = None) -> ConfigDict:
    """Return the config; arguments as in `common.small_data`."""
    config = common.small_data(arguments)
    config.data.name = "cifar100"
    return config
