"""TinyImageNet-200 from its official zip."""

import zipfile
from collections import defaultdict
from pathlib import Path, PurePosixPath

import tensorflow_datasets as tfds

from simplest_vit.data.builders.base import Archive, Builder, Content, Example, group
from simplest_vit.data.decode import standardize
from simplest_vit.errors import UserError

_ARCHIVE = Archive(
    url="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    size=248_100_043,
    sha256="6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
    folder="tiny-imagenet-200",
)


def _read(folder: Path) -> Content:
    """Keep JPEG files as they are, except for grey ones, which become RGB PNG. Classes are named by WordNet ID."""
    official = folder / _ARCHIVE.file_name
    found = [official] if official.is_file() else sorted(folder.glob(f"{_ARCHIVE.folder}*.zip"))
    if len(found) != 1:
        raise UserError(
            f"data.manual_dir={folder}: {len(found)} files named {_ARCHIVE.folder}*.zip, expected one; "
            f"download {_ARCHIVE.url} into it"
        )
    path = found[0]
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # zipfile raises more than its own
        raise UserError(f"{path}: not a complete zip file ({error}); download it again") from error
    members = defaultdict(list)  # the images of each folder, relative to the topmost one, in numeric order
    for name in sorted(archive.namelist(), key=lambda name: (len(name), name)):
        if name.endswith(".JPEG"):
            members[str(PurePosixPath(*PurePosixPath(name).parts[1:-1]))].append(name)
    wnids = _text(archive, "wnids.txt").split()
    if len(wnids) != 200:
        raise UserError(f"{path}:wnids.txt: {len(wnids)} classes, expected 200; download the zip again")

    def example(member: str, wnid: str) -> Example:
        return Example(
            name=f"{path}:{member}",
            size=archive.getinfo(member).file_size,
            image=lambda: standardize(archive.read(member)),
            features={"id": PurePosixPath(member).name, "label": wnid},
        )

    train = []
    for wnid in wnids:
        images = members[f"train/{wnid}/images"]
        if not images:
            raise UserError(f"{path}: no images in train/{wnid}/images, expected 500; download the zip again")
        train += [example(image, wnid) for image in images]
    labels = _validation_labels(archive, members["val/images"], set(wnids))
    features = {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(64, 64, 3)),
        "label": tfds.features.ClassLabel(names=wnids),
    }
    validation = [example(image, labels[PurePosixPath(image).name]) for image in members["val/images"]]
    return Content(features, group({"train": train, "validation": validation}))


def _text(archive: zipfile.ZipFile, member: str) -> str:
    """A text file of the topmost folder."""
    try:
        return archive.read(f"{archive.namelist()[0].split('/')[0]}/{member}").decode(errors="replace")
    except Exception as error:
        raise UserError(f"{archive.filename}:{member}: missing or damaged ({error}); download the zip again") from error


def _validation_labels(archive: zipfile.ZipFile, images: list[str], wnids: set[str]) -> dict[str, str]:
    """The WordNet ID of each validation image."""
    member = "val/val_annotations.txt"
    labels = {}
    for number, line in enumerate(_text(archive, member).splitlines(), 1):
        name, wnid, *_ = [*line.split("\t"), ""]
        if wnid not in wnids:
            raise UserError(
                f"{archive.filename}:{member}: line {number}: class {wnid!r} is not in wnids.txt; "
                "download the zip again"
            )
        labels[name] = wnid
    unlabelled = [image for image in images if PurePosixPath(image).name not in labels]
    if unlabelled or len(labels) != len(images):
        example = f" (the first without a line: {unlabelled[0]})" if unlabelled else ""
        raise UserError(
            f"{archive.filename}:{member}: {len(labels)} lines for {len(images)} images in val/images{example}; "
            "download the zip again"
        )
    return labels


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
