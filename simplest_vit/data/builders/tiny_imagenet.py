"""TinyImageNet-200 from its official zip."""

import zipfile
from collections import defaultdict
from pathlib import Path, PurePosixPath

import tensorflow_datasets as tfds

from simplest_vit.data.builders.base import Archive, Builder, Content, Example, checked, group

_FOLDER = "tiny-imagenet-200"  # in the archive
_ARCHIVE = Archive(
    url="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    size=248_100_043,
    sha256="6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
)


def _read(folder: Path) -> Content:
    """Read the zip; its files are kept as they are, and classes are named by WordNet ID."""
    path = _ARCHIVE.find(folder)
    archive = zipfile.ZipFile(path)
    members = defaultdict(list)  # the images of each folder, in numerical order
    for name in sorted(archive.namelist(), key=lambda name: (len(name), name)):
        if name.endswith(".JPEG"):
            members[str(PurePosixPath(name).parent)].append(name)
    wnids = archive.read(f"{_FOLDER}/wnids.txt").decode().split()
    annotations = archive.read(f"{_FOLDER}/val/val_annotations.txt").decode().splitlines()
    labels: dict[str, str] = dict(line.split("\t")[:2] for line in annotations)

    def example(member: str, wnid: str) -> Example:
        size, features = archive.getinfo(member).file_size, {"id": PurePosixPath(member).name, "label": wnid}
        return Example(f"{path}:{member}", size, checked(lambda: archive.read(member)), features)

    train = [example(image, wnid) for wnid in wnids for image in members[f"{_FOLDER}/train/{wnid}/images"]]
    validation = [example(image, labels[PurePosixPath(image).name]) for image in members[f"{_FOLDER}/val/images"]]
    features = {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(64, 64, 3)),
        "label": tfds.features.ClassLabel(names=wnids),
    }
    return Content(features, group({"train": train, "validation": validation}))


TINY_IMAGENET = Builder(
    name="tiny_imagenet",
    version="1.0.0",
    description="Colour images of 64 x 64 pixels in 200 classes of ImageNet: 100,000 to train and 10,000 to validate.",
    image_shape=(64, 64, 3),
    mean=(0.4802, 0.4481, 0.3975),
    std=(0.2770, 0.2691, 0.2821),
    read=_read,
    archive=_ARCHIVE,
)
