"""TinyImageNet-200 from its official zip."""

import functools
import zipfile
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

import tensorflow_datasets as tfds

from simplest_vit.data.builders.image_files import ImageFile, ImageFilesBuilder
from simplest_vit.data.builders.originals import Archive
from simplest_vit.errors import UserError


class TinyImagenet(ImageFilesBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Colour images of 64 x 64 pixels in 200 classes of ImageNet: 100,000 to train and 10,000 to validate.

    The JPEG files are kept as they are, except for grey ones, which become RGB (as PNG, without loss).
    Classes are named by WordNet ID, in the order of wnids.txt. Any zip of the same layout will do.
    """

    name = "tiny_imagenet"
    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The zip of `ARCHIVE`."
    ARCHIVE = Archive(
        url="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        size=248_100_043,
        sha256="6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
        folder="tiny-imagenet-200",
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(64, 64, 3)),
                    "label": tfds.features.ClassLabel(num_classes=200),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="http://cs231n.stanford.edu/",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        path = _find_zip(Path(dl_manager.manual_dir), self.ARCHIVE)
        try:
            archive = zipfile.ZipFile(path)
        except Exception as error:  # zipfile raises more than its own
            raise UserError(f"{path}: not a complete zip file ({error}); download it again") from error
        members = _group_by_folder(archive)
        wnids = _read(archive, path, "wnids.txt").split()
        if len(wnids) != 200:
            raise UserError(f"{path}:wnids.txt: {len(wnids)} classes, expected 200; download the zip again")
        self.info.features["label"].names = wnids
        train = []
        for wnid in wnids:
            images = members[f"train/{wnid}/images"]
            if not images:
                raise UserError(f"{path}: no images in train/{wnid}/images, expected 500; download the zip again")
            train += [(image, wnid) for image in images]
        validation = _validation(archive, path, members["val/images"], set(wnids))
        return {
            split: self._generate_examples(
                split,
                [
                    ImageFile(
                        f"{path}:{member}",
                        archive.getinfo(member).file_size,
                        functools.partial(archive.read, member),
                        {"id": PurePosixPath(member).name, "label": wnid},
                    )
                    for member, wnid in labelled
                ],
            )
            for split, labelled in (("train", train), ("validation", validation))
        }


def _find_zip(folder: Path, archive: Archive) -> Path:
    """The official zip of a folder, or the only one named like it."""
    official = folder / archive.file_name
    found = [official] if official.is_file() else sorted(folder.glob(f"{archive.folder}*.zip"))
    if len(found) != 1:
        raise UserError(
            f"data.manual_dir={folder}: {len(found)} files named {archive.folder}*.zip, expected one; "
            f"download {archive.url} into it"
        )
    return found[0]


def _group_by_folder(archive: zipfile.ZipFile) -> dict[str, list[str]]:
    """The image files of each folder, relative to the topmost one, in numeric order."""
    members = defaultdict(list)
    for name in archive.namelist():
        if name.endswith(".JPEG"):
            members[str(PurePosixPath(*PurePosixPath(name).parts[1:-1]))].append(name)
    for names in members.values():
        names.sort(key=lambda name: (len(name), name))
    return members


def _read(archive: zipfile.ZipFile, path: Path, member: str) -> str:
    """A text file of the topmost folder."""
    try:
        return archive.read(f"{archive.namelist()[0].split('/')[0]}/{member}").decode(errors="replace")
    except Exception as error:
        raise UserError(f"{path}:{member}: missing or damaged ({error}); download the zip again") from error


def _validation(archive: zipfile.ZipFile, path: Path, images: list[str], wnids: set[str]) -> list[tuple[str, str]]:
    """Pair the validation images with their WordNet IDs from val_annotations.txt."""
    file = f"{path}:val/val_annotations.txt"
    labels = {}
    for number, line in enumerate(_read(archive, path, "val/val_annotations.txt").splitlines(), 1):
        name, wnid, *_ = [*line.split("\t"), ""]
        if wnid not in wnids:
            raise UserError(f"{file}: line {number}: class {wnid!r} is not in wnids.txt; download the zip again")
        labels[name] = wnid
    unlabelled = [image for image in images if PurePosixPath(image).name not in labels]
    if unlabelled or len(labels) != len(images):
        example = f" (the first without a line: {unlabelled[0]})" if unlabelled else ""
        raise UserError(
            f"{file}: {len(labels)} lines for {len(images)} images in val/images{example}; download the zip again"
        )
    return [(image, labels[PurePosixPath(image).name]) for image in images]
