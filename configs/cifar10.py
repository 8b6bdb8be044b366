"""SimplEsT-ViT-S/4 or SimpleViT-S/4 on CIFAR-10: 90 epochs of batches of 2048 (2,160 steps).

The reference's top-1 validation accuracy (augmentation basic / strong; its E-SPA and orthogonal scale deviate from the
papers, see `model.attention` and `model.init` in `simplest_vit/config.py`):

    model=simplest_vit, Adam         79.36 / 78.94 %
    model=simplest_vit, Shampoo@25   82.43 / 84.96 %
    model=simple_vit, Adam           83.34 / 87.33 %

Ours, basic augmentation, one seed (RESULTS.md): 82.69 % (Shampoo@25), and with SOAP
87.55 % (model=isometric_vit) and 85.98 % (model=simple_vit).

    python main.py --config configs/cifar10.py:optimizer=adam --workdir runs/cifar10

Data: downloaded (170 MB), or from a folder with `cifar-10-batches-bin/` by `--config.data.manual_dir`.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arguments: str | None = None) -> ConfigDict:
    """Return the config; arguments as in `common.small_data`."""
    config = common.small_data(arguments)
    config.data.name = "cifar10"
    return config
