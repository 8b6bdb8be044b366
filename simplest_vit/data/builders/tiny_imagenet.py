"""TinyImageNet-200 from its official zip."""

import zipfile
from collections import defaultdict
from pathlib import Path, PurePosixPath

import tensorflow_datasets as tfds

from simplest_vit.data.builders.base import Archive, Builder, Content, Example, checked, group
from simplest_vit.errors import UserError

_ARCHIVE = Archive(
    url="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    size=248_100_043,
    sha256="6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
    folder="tiny-imagenet-200",
)


def _read(folder: Path) -> Content:
    """Read the zip; its files are kept as they are, and classes are named by WordNet ID."""
    found = sorted(folder.glob(f"{_ARCHIVE.folder}*.zip"))
    if len(found) != 1:
        raise UserError(
            f"config.data.manual_dir={folder}: {len(found)} files named {_ARCHIVE.folder}*.zip, expected one; "
            f"download {_ARCHIVE.url} into it"
        )
    path = found[0]
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # zipfile raises more than its own errors
        raise UserError(f"{path}: not a complete zip file ({error}); download it again") from error
    members = defaultdict(list)  # the images of each folder, relative to the topmost one, in numerical order
    for name in sorted(archive.namelist(), key=lambda name: (len(name), name)):
        if name.endswith(".JPEG"):
            members[str(PurePosixPath(*PurePosixPath(name).parts[1:-1]))].append(name)
    wnids = _lines(archive, "wnids.txt")
    if len(wnids) != 200:
        raise UserError(f"{path}:wnids.txt: {len(wnids)} classes, expected 200; download the zip again")

    def example(member: str, wnid: str) -> Example:
        size, features = archive.getinfo(member).file_size, {"id": PurePosixPath(member).name, "label": wnid}
        return Example(f"{path}:{member}", size, checked(lambda: archive.read(member)), features)

    train = []
    for wnid in wnids:
        images = members[f"train/{wnid}/images"]
        if not images:
            raise UserError(f"{path}: no images in train/{wnid}/images, expected 500; download the zip again")
        train += [example(image, wnid) for image in images]
    validation, images = [], members["val/images"]
    annotations = [line.split("\t") for line in _lines(archive, "val/val_annotations.txt")]
    labels = {fields[0]: fields[1] for fields in annotations if len(fields) > 1}
    for image in images:
        wnid = labels.get(PurePosixPath(image).name, "")
        if wnid not in wnids or len(labels) != len(images):
            raise UserError(
                f"{path}:val/val_annotations.txt: {len(labels)} lines for {len(images)} images in val/images; "
                f"class of {image}: {wnid!r}; download the zip again"
            )
        validation.append(example(image, wnid))
    features = {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(64, 64, 3)),
        "label": tfds.features.ClassLabel(names=wnids),
    }
    return Content(features, group({"train": train, "validation": validation}))


def _lines(archive: zipfile.ZipFile, member: str) -> list[str]:
    """Read the lines of a text file in the topmost folder."""
    try:
        text = archive.read(f"{archive.namelist()[0].split('/')[0]}/{member}").decode(errors="replace")
    except Exception as error:
        raise UserError(f"{archive.filename}:{member}: missing or damaged ({error}); download the zip again") from error
    return text.splitlines()


TINY_IMAGENET = Builder(
    name="tiny_imagenet",
    version="1.0.0",
    description="Colour images of 64 x 64 pixels in 200 classes of ImageNet: 100,000 to train and 10,000 to validate.",
    image_shape=(64, 64, 3),
    mean=(0.4802, 0.4481, 0.3975),
    std=(0.2770, 0.2691, 0.2821),
    read=_read,
    archive=_ARCHIVE,
    expected={"train": 100_000, "validation": 10_000},
)
