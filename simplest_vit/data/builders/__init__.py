"""The data sets that this project prepares from their original files, without TensorFlow."""

from simplest_vit.data.builders import cifar, digits, image_folder, imagenet, tiny_imagenet
from simplest_vit.data.builders.base import Builder

BUILDERS: dict[str, Builder] = {
    "digits": digits.DIGITS,
    "cifar10": cifar.CIFAR10,
    "cifar100": cifar.CIFAR100,
    "tiny_imagenet": tiny_imagenet.TINY_IMAGENET,
    "imagenet": imagenet.IMAGENET,
    "image_folder": image_folder.IMAGE_FOLDER,
}


def find_builder(name: str) -> Builder | None:
    """Return the builder of a data set, by its name here or in TFDS; None if only TFDS can prepare it."""
    return next((builder for key, builder in BUILDERS.items() if name in (key, builder.name)), None)
