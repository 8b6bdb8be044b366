"""The data sets, from their original files to examples, without TensorFlow."""

from simplest_vit.data.builders import cifar, digits, image_folder, imagenet, tiny_imagenet
from simplest_vit.data.builders.base import Builder
from simplest_vit.errors import UserError

BUILDERS: dict[str, Builder] = {
    "digits": digits.DIGITS,
    "cifar10": cifar.CIFAR10,
    "cifar100": cifar.CIFAR100,
    "tiny_imagenet": tiny_imagenet.TINY_IMAGENET,
    "imagenet": imagenet.IMAGENET,
    "image_folder": image_folder.IMAGE_FOLDER,
}


def builder_of(name: str) -> Builder:
    """Look up a data set.

    Raises:
      UserError: If there is none of that name.
    """
    if name not in BUILDERS:
        raise UserError(f"data.name={name}: unknown; expected one of {', '.join(BUILDERS)}")
    return BUILDERS[name]
