"""ImageNet-1k from its two tars, streamed; features, names and version are those of TFDS's own builder."""

import functools
import tarfile
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from simplest_vit.data.builders.base import Builder, Content, Example, Shard, group
from simplest_vit.data.decode import standardize
from simplest_vit.errors import UserError

_TFDS_FOLDER = "datasets/imagenet2012"  # TFDS ships the class names and the validation labels


def _read(folder: Path) -> Content:
    """Keep JPEG files as they are, except for the CMYK ones and the PNG in disguise, which become RGB PNG.

    A train shard holds a class; the order within the files does not matter, for training reads at random.
    """
    label = tfds.features.ClassLabel(names_file=tfds.core.tfds_path(f"{_TFDS_FOLDER}/labels.txt"))
    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": label,
        "file_name": tfds.features.Text(),
    }
    train = _train_shards(folder / "ILSVRC2012_img_train.tar", set(label.names))
    validation = _validation_examples(folder / "ILSVRC2012_img_val.tar")
    return Content(features, {"train": train, **group({"validation": validation})})


def _members(path: Path) -> list[tarfile.TarInfo]:
    """The files of a tar, from their headers alone.

    Raises:
      UserError: If the tar is missing or cut off.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: missing; download it from https://image-net.org (registration needed) and set data.manual_dir"
        )
    try:
        with tarfile.open(path, "r:") as tar:
            members = [member for member in tar if member.isfile()]
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{path}: not a complete tar ({error}); download it again") from error
    if _slice(path, end, 512) != bytes(512):
        raise UserError(f"{path}: {path.stat().st_size:,} bytes, without the end of a tar; download it again")
    return members


def _slice(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def _example(path: Path, split: str, wnid: str, member: tarfile.TarInfo) -> Example:
    """An image of a tar, given where its bytes are."""
    return Example(
        name=f"{split}:{Path(member.name).name}",
        size=member.size,
        image=lambda: standardize(_slice(path, member.offset_data, member.size), keep_grey=True),
        features={"label": wnid, "file_name": Path(member.name).name},
    )


def _train_shards(path: Path, wnids: set[str]) -> list[Shard]:
    """A shard for each of the inner tars, WNID.tar."""
    members = _members(path)
    for member in members:
        if Path(member.name).stem not in wnids:
            raise UserError(f"{path}: holds {member.name}, expected WNID.tar for the 1,000 classes of ImageNet-1k")
    return [Shard(member.size, functools.partial(_examples_of_class, path, member)) for member in members]


def _examples_of_class(path: Path, member: tarfile.TarInfo) -> Iterator[Example]:
    """The images of an inner tar, whose headers are read only now."""
    with path.open("rb") as file:
        file.seek(member.offset_data)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for image in tar:
                    if image.offset_data + image.size > member.offset_data + member.size:
                        raise tarfile.ReadError(f"{image.name} goes on past its end")
                    yield _example(path, "train", Path(member.name).stem, image)
        except tarfile.TarError as error:
            raise UserError(f"{path}:{member.name}: not a complete tar ({error}); download it again") from error


def _validation_examples(path: Path) -> list[Example]:
    """In alphabetic order, with the labels that TFDS ships."""
    wnids = tfds.core.tfds_path(f"{_TFDS_FOLDER}/validation_labels.txt").read_text().split()
    labels = {f"ILSVRC2012_val_{number:08d}.JPEG": wnid for number, wnid in enumerate(wnids, 1)}
    members = sorted(_members(path), key=lambda member: member.name)
    for member in members:
        if Path(member.name).name not in labels:
            raise UserError(f"{path}: holds {member.name}, expected ILSVRC2012_val_00000001.JPEG and so on")
    return [_example(path, "validation", labels[Path(member.name).name], member) for member in members]


IMAGENET = Builder(
    name="imagenet2012",
    version="5.1.0",
    description="ImageNet-1k (ILSVRC 2012): 1,281,167 images of 1,000 classes to train, 50,000 to validate.",
    image_shape=(224, 224, 3),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    read=_read,
    resumable=True,
)
