"""Prepare data sets: from the original files to TFDS's array_record files, without TensorFlow.

A prepared data set is complete or absent, never half.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from filelock import SoftFileLease, Timeout

from simplest_vit.data.builders import builder_of
from simplest_vit.data.builders.base import Builder, Content, Shard
from simplest_vit.data.progress import Progress
from simplest_vit.errors import UserError
from simplest_vit.files import local_path

_LEASE = 60  # seconds of silence after which a process that prepares counts as gone; it tells of itself every 20
_REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space or choose another")
_REMEDIES |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it writable or choose another")


def prepare(
    name: str, data_dir: str | None = None, manual_dir: str | None = None, *, skip_corrupt: bool = False
) -> tfds.core.DatasetBuilder:
    """Prepare a data set unless it is there.

    Of several processes, on one host or on many that share a file system, one prepares and the others wait for it.

    Args:
      name: A name in `BUILDERS`.
      data_dir: Where TFDS data sets live; None for ~/tensorflow_datasets.
      manual_dir: A folder with the original files; None to download them to `data_dir`/downloads.
      skip_corrupt: Whether to leave damaged images out instead of failing.

    Returns:
      TFDS's builder of the prepared data set.

    Raises:
      UserError: If the name is unknown, the originals are missing or damaged, or the disk cannot take it.
    """
    builder = builder_of(name)
    try:
        root = Path(local_path(data_dir or "~/tensorflow_datasets"))
        originals = Path(local_path(manual_dir)) if manual_dir else root / "downloads"
    except RuntimeError as error:  # of an unknown user
        raise UserError(f"data.dir={data_dir}, data.manual_dir={manual_dir}: {error} Name another folder") from error
    try:
        path = root / builder.name / builder.version
        if builder.config or not path.exists():  # what is prepared needs its originals only to tell which variant it is
            _check_originals(name, manual_dir, originals)
        if builder.config:
            path = root / builder.name / builder.config(originals) / builder.version
        while not path.exists():
            lease = SoftFileLease(path.with_name(".preparing"), lease_duration=_LEASE)
            try:
                with _held(lease):
                    if not path.exists():  # or another process has been faster
                        print(f"preparing {name} in {path}", file=sys.stderr, flush=True)
                        if builder.archive and not manual_dir:
                            builder.archive.download(originals)
                        _prepare(builder, originals, path, skip_corrupt)
            except Exception:
                if not lease.compromise:  # else this process stood still, and another has taken over
                    raise
    except OSError as error:
        problem = error.strerror or str(error)
        if manual_dir and error.filename and Path(str(error.filename)).is_relative_to(originals):
            raise UserError(f"{error.filename}: cannot be read ({problem}); repair or remove it") from error
        remedy = _REMEDIES.get(error.errno or 0, "choose another")
        raise UserError(f"data.dir={root}: cannot prepare {name} there ({problem}); {remedy}") from error
    try:
        return tfds.builder_from_directory(path)
    except Exception as error:
        raise damaged(path, error) from error


def _check_originals(name: str, manual_dir: str | None, originals: Path) -> None:
    """Raise a UserError if the folder that is named has nothing, or none is named where there must be one."""
    if manual_dir and not (originals.is_dir() and any(originals.iterdir())):
        problem = "an empty folder" if originals.is_dir() else "no such folder"
        raise UserError(f"data.manual_dir={manual_dir}: {problem}; give the one with the original files")
    if name == "image_folder" and not manual_dir:
        raise UserError("data.manual_dir: not set; image_folder needs the folder with train/ and val/")


def damaged(folder: Path, error: Exception) -> UserError:
    """What to raise where TFDS stumbles over the metadata of a prepared data set; it names a file that is no JSON."""
    place = folder
    for path in sorted(folder.glob("*.json")):
        try:
            if not json.loads(path.read_bytes()):
                raise ValueError("it is empty")
        except (OSError, ValueError) as problem:
            place, error = path, problem
            break
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"{place}: damaged ({reason}); remove {folder} to prepare it anew")


@contextlib.contextmanager
def _held(lease: SoftFileLease) -> Iterator[None]:
    """Hold a lease: a file with host, process and heartbeat, since file systems of several hosts may not know flock."""
    folder = Path(lease.lock_file).parent
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lease.acquire(blocking=False)
    except Timeout:
        owner = lease.owner  # None while it writes its name
        who = f"process {owner.pid} of {owner.hostname}" if owner else "another process"
        print(f"waiting for {who} to prepare {folder}", file=sys.stderr)
        lease.acquire(poll_interval=0.5)
    try:
        yield
    finally:
        lease.release()


def _prepare(builder: Builder, originals: Path, path: Path, skip_corrupt: bool) -> None:
    """Write the shards, then the metadata, then give the folder its final name."""
    content = builder.read(originals)
    token = "" if builder.resumable else secrets.token_hex(4)
    folder = path.with_name(f"{path.name}.unfinished{token}")
    for left in set(path.parent.glob(f"{path.name}.unfinished*")) - {folder}:
        shutil.rmtree(left, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    try:
        _write(builder, content, folder, path, skip_corrupt)
        folder.rename(path)
    except BaseException:
        if not builder.resumable:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _write(builder: Builder, content: Content, folder: Path, path: Path, skip_corrupt: bool) -> None:
    """Write what is not there yet of the data set that will be `path`."""
    features = tfds.features.FeaturesDict(content.features)
    files: dict[str, dict[Path, Shard]] = {}
    for split, shards in content.splits.items():
        stem = folder / f"{builder.name}-{split}.array_record"
        files[split] = {Path(f"{stem}-{i:05d}-of-{len(shards):05d}"): shard for i, shard in enumerate(shards)}
    for left in set(folder.iterdir()).difference(*files.values()):
        left.unlink()
    corrupt = sum(_write_shards(split, shards, features, skip_corrupt) for split, shards in files.items())
    if corrupt and not skip_corrupt:
        raise UserError(
            f"{corrupt} corrupt images, listed above; repair or delete them, or prepare with --skip_corrupt"
        )
    template = tfds.core.ShardedFileTemplate(folder, dataset_name=builder.name, filetype_suffix="array_record")
    splits = []
    for split, written in files.items():
        lengths = [ArrayRecordReader(str(file)).num_records() for file in written]
        if not any(lengths):
            raise UserError(f"{split}: all images are corrupt, listed above; repair some")
        num_bytes = sum(file.stat().st_size for file in written)
        splits.append(tfds.core.SplitInfo(split, lengths, num_bytes, template.replace(split=split)))
    if corrupt:
        print(f"skipped {corrupt} corrupt images, listed above", file=sys.stderr, flush=True)
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name=builder.name,
            version=tfds.core.Version(builder.version),
            data_dir=str(folder),
            module_name="",
            config_name=path.parent.name if builder.config else None,
        ),
        description=builder.description,
        features=features,
        supervised_keys=("image", "label"),
        disable_shuffling=True,
    )
    info.set_file_format("array_record")
    info.set_splits(tfds.core.splits.SplitDict(splits))
    info.write_to_directory(folder)


def _write_shards(
    split: str, shards: dict[Path, Shard], features: tfds.features.FeaturesDict, skip_corrupt: bool
) -> int:
    """Write the shards that are not there yet, and tell the number of corrupt images, which are named."""
    missing = {path: shard for path, shard in shards.items() if not path.exists()}
    progress = Progress(f"preparing {split}", sum(shard.size for shard in missing.values()))
    corrupt = 0
    for path, shard in missing.items():
        partial = path.with_name(f"partial-{secrets.token_hex(4)}")
        try:
            damaged_ones = _write_shard(partial, shard, features, progress)
        except RuntimeError as error:  # array_record's, of a full disk
            number = next((number for number in errno.errorcode if os.strerror(number) in str(error)), None)
            if number is None:
                raise
            raise OSError(number, os.strerror(number)) from error
        if not damaged_ones or skip_corrupt:  # else this shard is read again, and its images reported again
            os.replace(partial, path)
        corrupt += damaged_ones
    return corrupt


def _write_shard(path: Path, shard: Shard, features: tfds.features.FeaturesDict, progress: Progress) -> int:
    """Write a shard, and tell the number of corrupt images, which are named."""
    corrupt = 0
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")  # JPEG and PNG compress no further
    for example in shard.examples():
        try:
            image = example.image()
        except Exception as error:  # also of a zip, a directory, a link to nowhere
            reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
            print(f"corrupt image {example.name}: {reason}", file=sys.stderr, flush=True)
            corrupt += 1
        else:
            writer.write(features.serialize_example(features.encode_example({"image": image, **example.features})))
        progress.add(1, example.size)
    writer.close()
    return corrupt


def describe(builder: tfds.core.DatasetBuilder) -> str:
    """The splits, classes and checksums of a prepared data set, a line each."""
    lines = [f"{builder.info.full_name} in {builder.data_path}"]
    for name, split in builder.info.splits.items():
        lines.append(f"  {name}: {split.num_examples:,} examples, {split.num_bytes / 1e6:,.1f} MB")
    for name, feature in builder.info.features.items():
        if isinstance(feature, tfds.features.ClassLabel):
            some = ", ".join(feature.names[:10]) + (", ..." if feature.num_classes > 10 else "")
            lines.append(f"  {name}: {feature.num_classes} classes: {some}")
    for path in sorted(Path(builder.data_path).glob("*.array_record*")):
        with path.open("rb") as file:
            lines.append(f"  sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}")
    return "\n".join(lines)
