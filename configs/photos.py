r"""An isometric ViT of 12 blocks on your own photos: a folder of CLASS/*.jpg.

    simplest-vit train --config photos --config.data.manual_dir=FOLDER --workdir runs/photos

docs/own_photos.md shows what to expect. Made for a CPU and some 1,000 photos: small images, a small network. With a GPU
or more photos try --config.data.image_size=224 --config.model.patch_size=16 --config.model.width=384
--config.model.num_heads=6 --config.model.mlp_dim=1536, which is S/16.
"""

from ml_collections import ConfigDict

from simplest_vit.recipes import common


def get_config(arguments: str | None = None) -> ConfigDict:
    """Return the config; arguments as in `common.start`, whose defaults here are an isometric ViT and SOAP."""
    config = common.start(f"model=isometric_vit,optimizer=soap,{arguments or ''}")
    config.data.name = "image_folder"
    config.epochs = 20
    config.min_steps = 240  # 20 epochs of 500 photos; fewer photos need more epochs
    config.batch_size = 32
    config.warmup_steps = 75
    config.weight_decay = 5e-5
    config.grad_clip = 1.0
    config.eval_every = config.log_every = "2 epochs"
    config.checkpoint_every = "10 epochs"
    config.compute_dtype = "float32"  # bfloat16 is slower on most CPUs

    config.model.depth = 12
    config.model.width = 64
    config.model.num_heads = 8
    config.model.mlp_dim = 128
    config.model.patch_size = 8

    config.data.image_size = 64
    config.data.crop_padding = 4
    config.data.flip = True
    return config
