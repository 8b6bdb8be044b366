"""ImageNet-1k from its two tars, streamed; features, names and version are those of TFDS's own builder."""

import functools
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import tensorflow_datasets as tfds

from simplest_vit.data.builders.base import Builder, Content, Example, Shard, group
from simplest_vit.data.decode import decode_image, encode_png, open_image
from simplest_vit.errors import UserError

_TFDS_FOLDER = "datasets/imagenet2012"  # TFDS ships the class names and the validation labels
CLASSES, VALIDATION = 1000, 50_000  # in the published tars


def _read(folder: Path) -> Content:
    """Read the tars; their files are kept as they are, except for CMYK images and a PNG with a JPEG's name.

    A training shard holds one class; the order within the files does not matter because training reads at random.
    """
    label = tfds.features.ClassLabel(names_file=tfds.core.tfds_path(f"{_TFDS_FOLDER}/labels.txt"))
    features = {"image": tfds.features.Image(encoding_format="jpeg"), "label": label, "file_name": tfds.features.Text()}
    train = _train_shards(folder / "ILSVRC2012_img_train.tar", set(label.names))
    validation = _validation_examples(folder / "ILSVRC2012_img_val.tar")
    return Content(features, {"train": train, **group({"validation": validation})})


class _Header(tarfile.TarInfo):
    """A header of a tar, read as in Python 3.11.14: earlier versions seek back by a negative size, forever."""

    def _block(self, count: int) -> int:
        if count < 0:
            raise tarfile.InvalidHeaderError("negative size")  # type: ignore[attr-defined]
        return super()._block(count)  # type: ignore[misc]


def _members(file: BinaryIO, where: str) -> list[tarfile.TarInfo]:
    """List the files of a tar from their headers; a UserError if it is damaged or cut off."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
            members = [member for member in tar if member.isfile()]
            file.seek(tar.offset)
            if file.read(512) != bytes(512):
                raise tarfile.ReadError(f"{size:,} bytes, without the end of a tar")
        for member in members:
            if member.offset_data + member.size > size:
                raise tarfile.ReadError(f"{member.name!a} extends past the end")
    except (tarfile.TarError, EOFError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a complete tar ({error}); download it again") from error
    return members


def _open(path: Path) -> BinaryIO:
    if not path.is_file():
        raise UserError(
            f"{path}: missing; download it from https://image-net.org (registration needed) and name its folder: "
            "--config.data.manual_dir=FOLDER"
        )
    return path.open("rb")


def _slice(path: Path, member: tarfile.TarInfo) -> bytes:
    with path.open("rb") as file:
        file.seek(member.offset_data)
        return file.read(member.size)


def _example(split: str, wnid: str, member: tarfile.TarInfo, read: Callable[[], bytes]) -> Example:
    """Describe an image of a tar, given how to read it."""
    name = Path(member.name).name

    def image() -> bytes:
        content = read()
        decode_image(content, 3, (1, 1))
        with open_image(content) as opened:
            as_tfds = opened.format in ("JPEG", "MPO") and opened.mode in ("RGB", "L")
        return content if as_tfds else encode_png(decode_image(content, 3))

    return Example(f"{split}/{wnid}/{name}", member.size, image, {"label": wnid, "file_name": os.fsencode(name)})


def _train_shards(path: Path, wnids: set[str]) -> list[Shard]:
    """Make a shard of each inner tar, WNID.tar."""
    with _open(path) as file:
        members = _members(file, str(path))
    names = [Path(member.name).name for member in members]
    for name in names:
        if not name.endswith(".tar") or name.removesuffix(".tar") not in wnids or names.count(name) > 1:
            raise UserError(f"{path}: holds {name!a}, expected WNID.tar once for each of the classes of ImageNet-1k")
    if len(members) != CLASSES:
        raise UserError(
            f"{path}: {len(members):,} classes, expected {CLASSES:,}; download it again, or unpack it and prepare the "
            "classes as an image_folder"
        )
    return [Shard(member.size, functools.partial(_examples_of_class, path, member)) for member in members]


def _examples_of_class(path: Path, member: tarfile.TarInfo) -> Iterator[Example]:
    """Iterate over the images of an inner tar of about 100 MB, which is read only now."""
    tar = _slice(path, member)
    images = _members(io.BytesIO(tar), f"{path}:{member.name}")
    if not images:
        raise UserError(f"{path}:{member.name}: holds no image; download it again")
    for image in images:
        content = tar[image.offset_data : image.offset_data + image.size]
        yield _example("train", Path(member.name).stem, image, functools.partial(bytes, content))


def _validation_examples(path: Path) -> list[Example]:
    """List the validation images in alphabetical order, with the labels that TFDS ships."""
    wnids = tfds.core.tfds_path(f"{_TFDS_FOLDER}/validation_labels.txt").read_text().split()
    labels = {f"ILSVRC2012_val_{number:08d}.JPEG": wnid for number, wnid in enumerate(wnids, 1)}
    with _open(path) as file:
        members = {Path(member.name).name: member for member in _members(file, str(path))}
    for name in members:
        if name not in labels:
            raise UserError(f"{path}: holds {name!a}, expected ILSVRC2012_val_00000001.JPEG and so on")
    if len(members) != VALIDATION:
        raise UserError(f"{path}: {len(members):,} images, expected {VALIDATION:,}; download it again")
    return [
        _example("validation", labels[name], member, functools.partial(_slice, path, member))
        for name, member in sorted(members.items())
    ]


IMAGENET = Builder(
    name="imagenet2012",
    version="5.1.0",
    description="ImageNet-1k (ILSVRC 2012): 1,281,167 images of 1,000 classes to train, 50,000 to validate.",
    image_shape=(224, 224, 3),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    read=_read,
    resumable=True,
    expected={"train": 1_281_167, "validation": VALIDATION},
)
