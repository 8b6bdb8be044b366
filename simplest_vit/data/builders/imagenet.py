"""ImageNet-1k from its two tars, streamed, a shard at a time; an interrupted run goes on where it stopped."""

import dataclasses
import functools
import io
import os
import re
import secrets
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from simplest_vit.data.builders.image_files import ImageFilesBuilder
from simplest_vit.data.progress import Progress
from simplest_vit.errors import UserError

_TFDS_FOLDER = "datasets/imagenet2012"  # TFDS ships the class names and the validation labels
_VALIDATION_IMAGES_PER_SHARD = 500
# Images of a shard: (file name, WordNet ID, JPEG).
_Images = Iterator[tuple[str, str, bytes]]


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A file to write: how many bytes of the tar it takes, and its images when they are asked for."""

    size: int
    images: Callable[[], _Images]


class Imagenet2012(ImageFilesBuilder, skip_registration=True):  # type: ignore[call-arg]
    """ImageNet-1k (ILSVRC 2012): 1,281,167 images of 1,000 classes to train, 50,000 to validate.

    Features, names and version are those of TFDS's own builder. The JPEG files are kept as they are, except for
    the CMYK ones and the PNG in disguise, which become RGB PNG. A train shard holds a class; the order within the
    files does not matter, for training reads at random.
    """

    VERSION = tfds.core.Version("5.1.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from https://image-net.org"

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names_file=tfds.core.tfds_path(f"{_TFDS_FOLDER}/labels.txt")),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://image-net.org/",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> Any:
        raise NotImplementedError("this builder writes its shards itself")

    def download_and_prepare(
        self, *, download_config: tfds.download.DownloadConfig, file_format: str = "array_record", **_: Any
    ) -> None:
        """Write the shards that are not there yet, then the metadata, then give the folder its final name.

        TFDS's own method cannot be resumed: it writes to a folder with a random name and deletes it on failure.

        Args:
          download_config: Its `manual_dir` holds the tars.
          file_format: Must be array_record.

        Raises:
          UserError: If a tar is missing, cut off or holds something else, or an image is corrupt.
        """
        if file_format != "array_record":
            raise UserError(f"imagenet is prepared as array_record only, not as {file_format}")
        manual_dir = Path(download_config.manual_dir)
        wnids = set(self.info.features["label"].names)
        splits = {
            "train": _train_shards(_tar(manual_dir, "ILSVRC2012_img_train.tar"), wnids),
            "validation": _validation_shards(_tar(manual_dir, "ILSVRC2012_img_val.tar"), wnids),
        }
        final = Path(self.data_path)
        unfinished = final.with_name(final.name + ".unfinished")
        unfinished.mkdir(parents=True, exist_ok=True)
        for partial in unfinished.glob("partial-*"):
            partial.unlink()
        self.info.set_file_format(file_format, override=True)
        split_infos = [self._write_split(unfinished, name, shards) for name, shards in splits.items()]
        self._check_corrupt()
        self.info.set_splits(tfds.core.splits.SplitDict(split_infos))
        self.info.write_to_directory(unfinished)
        unfinished.rename(final)
        self.info.update_data_dir(str(final))

    def _write_split(self, folder: Path, split: str, shards: list[_Shard]) -> tfds.core.SplitInfo:
        """Write the missing shards of a split and tell how it goes on."""
        lengths, num_bytes = [], 0
        progress = Progress(f"preparing {split}", sum(shard.size for shard in shards))
        for index, shard in enumerate(shards):
            path = folder / f"{self.name}-{split}.array_record-{index:05d}-of-{len(shards):05d}"
            if path.exists():
                progress.skip(shard.size)
            else:
                # JPEG does not compress further.
                partial = path.with_name(f"partial-{secrets.token_hex(4)}-{path.name}")
                writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
                for file_name, wnid, content in shard.images():
                    image = self._standardize(f"{split}:{file_name}", io.BytesIO(content).read, keep_grey=True)
                    if image is not None:
                        example = {"image": image, "label": wnid, "file_name": file_name}
                        features = self.info.features
                        writer.write(features.serialize_example(features.encode_example(example)))
                    progress.add(1, len(content))
                writer.close()
                if self._corrupt and not self._skip_corrupt:
                    partial.unlink()  # so that this shard is read again, and its images reported again
                else:
                    os.replace(partial, path)
            if path.exists():
                lengths.append(ArrayRecordReader(str(path)).num_records())
                num_bytes += path.stat().st_size
        self._check_any(split, any(lengths) or not self._skip_corrupt)
        return tfds.core.SplitInfo(
            name=split, shard_lengths=lengths, num_bytes=num_bytes, filename_template=self._template(folder, split)
        )

    def _template(self, folder: Path, split: str) -> Any:
        return tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=self.name, split=split, filetype_suffix="array_record"
        )


def _tar(manual_dir: Path, name: str) -> Path:
    path = manual_dir / name
    if not path.is_file():
        raise UserError(
            f"{path}: missing; download it from https://image-net.org (registration needed) and set data.manual_dir"
        )
    return path


def _members(path: Path) -> list[tarfile.TarInfo]:
    """The files of a tar, from their headers alone.

    Raises:
      UserError: If the tar is cut off.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            members = [member for member in tar if member.isfile()]
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{path}: not a complete tar ({error}); download it again") from error
    with path.open("rb") as file:
        file.seek(end)
        if file.read(512) != bytes(512):
            raise UserError(f"{path}: {path.stat().st_size:,} bytes, without the end of a tar; download it again")
    return members


def _train_shards(path: Path, wnids: set[str]) -> list[_Shard]:
    """A shard for each of the inner tars, WNID.tar."""
    members = _members(path)
    for member in members:
        if Path(member.name).stem not in wnids:
            raise UserError(f"{path}: holds {member.name}, expected WNID.tar for the 1,000 classes of ImageNet-1k")
    if len(members) != len(wnids):
        print(f"warning: {path}: {len(members)} classes, ImageNet-1k has {len(wnids):,}", file=sys.stderr, flush=True)
    return [_Shard(member.size, functools.partial(_images_of_class, path, member)) for member in members]


def _images_of_class(path: Path, member: tarfile.TarInfo) -> _Images:
    wnid = Path(member.name).stem
    end = member.offset_data + member.size
    with path.open("rb") as file:
        file.seek(member.offset_data)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for image in tar:
                    if image.offset_data + image.size > end:
                        raise tarfile.ReadError(f"{image.name} goes on past its end")
                    file.seek(image.offset_data)
                    yield image.name, wnid, file.read(image.size)
        except tarfile.TarError as error:
            raise UserError(f"{path}:{member.name}: not a complete tar ({error}); download it again") from error


def _validation_shards(path: Path, wnids: set[str]) -> list[_Shard]:
    """Shards of equally many images, in alphabetic order."""
    members = sorted(_members(path), key=lambda member: member.name)
    labels_path = path.with_name("validation_labels.txt")
    if not labels_path.is_file():
        labels_path = Path(tfds.core.tfds_path(f"{_TFDS_FOLDER}/validation_labels.txt"))
    labels = labels_path.read_text(errors="replace").split()
    if len(members) != 50_000:
        print(f"warning: {path}: {len(members)} images, ImageNet-1k has 50,000", file=sys.stderr, flush=True)
    labelled = []
    for member in members:
        match = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", Path(member.name).name)
        if match is None:
            raise UserError(f"{path}: holds {member.name}, expected ILSVRC2012_val_00000001.JPEG and so on")
        number = int(match[1])
        if number > len(labels):
            raise UserError(
                f"{labels_path}: {len(labels)} lines, but there is an image {member.name}; a line is missing"
            )
        if labels[number - 1] not in wnids:
            raise UserError(f"{labels_path}: line {number}: {labels[number - 1]!r} is no class of ImageNet-1k")
        labelled.append((member, labels[number - 1]))
    size = _VALIDATION_IMAGES_PER_SHARD
    groups = [labelled[i : i + size] for i in range(0, len(labelled), size)]
    return [
        _Shard(sum(member.size for member, _ in group), functools.partial(_images_of_group, path, group))
        for group in groups
    ]


def _images_of_group(path: Path, group: list[tuple[tarfile.TarInfo, str]]) -> _Images:
    with path.open("rb") as file:
        for member, wnid in group:
            file.seek(member.offset_data)
            yield Path(member.name).name, wnid, file.read(member.size)
