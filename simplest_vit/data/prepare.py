"""Prepare data sets: from the original files to TFDS's array_record files, without TensorFlow.

A prepared data set is either complete or absent.
"""

import contextlib
import errno
import itertools
import json
import os
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tensorflow_datasets as tfds
from filelock import SoftFileLease, Timeout
from tensorflow_datasets.core import read_only_builder, registered
from tensorflow_datasets.proto import tf_example_pb2

from simplest_vit.data.builders import BUILDERS, find_builder
from simplest_vit.data.builders.base import Builder, Content, Example, Shard
from simplest_vit.data.prepared import Prepared
from simplest_vit.data.records import Progress, cannot_read, cpu_count, system_error
from simplest_vit.errors import UserError, first_line, one_line
from simplest_vit.files import local_path, sha256

_FORMAT = tfds.core.FileFormat.ARRAY_RECORD
_LEASE = 60  # seconds without renewal after which the preparing process counts as dead; it renews every 20
_CHUNK = 256  # images read and checked together
_REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space or choose another")
_REMEDIES |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it writable or choose another")
_REMEDIES |= dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)")
# Errors of a single file, not of a disk or of the system.
_OF_ONE_FILE = (errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM)


def prepare(
    name: str, data_dir: str | None = None, manual_dir: str | None = None, *, skip_corrupt: bool = False
) -> Prepared:
    """Open a data set, and prepare it first unless it is already prepared.

    If several processes call this, on one host or on many that share a file system, one prepares and the others wait.

    Args:
      name: A name in `BUILDERS`, or of a data set that TFDS has prepared.
      data_dir: Folder of TFDS data sets; None for ~/tensorflow_datasets.
      manual_dir: Folder with the original files; None to download them to `data_dir`/downloads.
      skip_corrupt: Skip unreadable images instead of failing.

    Raises:
      UserError: If the name is unknown, the originals are missing or damaged, or the disk is full or not writable.
    """
    builder = find_builder(name)
    if builder is None:
        prepared = open_prepared(name, data_dir)
    else:
        root = _root(data_dir)
        originals = Path(local_path(manual_dir)).absolute() if manual_dir else root / "downloads"
        path = root / builder.name / builder.version
        with _reading(originals):
            if builder.variant or not path.exists():  # a prepared set needs its originals only to determine its variant
                _check_originals(name, manual_dir, originals)
            if builder.variant:
                path = root / builder.name / builder.variant(originals) / builder.version
            elif manual_dir and path.exists():
                print(f"{path} is prepared already; {manual_dir} is not read", file=sys.stderr, flush=True)
        try:
            _prepare_under_lease(builder, name, originals, path, download=not manual_dir, skip_corrupt=skip_corrupt)
        except OSError as error:
            remedy = _REMEDIES.get(error.errno or 0, "choose another")
            reason = error.strerror or error
            raise UserError(f"config.data.dir={root}: cannot prepare {name} there ({reason}); {remedy}") from error
        prepared = Prepared(_open(path), builder.mean, builder.std)
    _ = prepared.fingerprint  # measures the data set now, unless it is already measured
    return prepared


def open_prepared(name: str, data_dir: str | None) -> Prepared:
    """Open a data set that TFDS has prepared; a UserError if there is none of that name, or it is damaged."""
    root = _root(data_dir)
    try:
        folder = Path(read_only_builder.builder_from_files(name, data_dir=root).data_path)
    except Exception as error:
        if isinstance(error, OSError):
            raise cannot_read(root, error) from error
        is_unknown = isinstance(error, registered.DatasetNotFoundError) or "Parsing builder name" in str(error)
        if not is_unknown:
            raise _cannot_open(f"config.data.name={name} in {root}", error) from error
        raise UserError(
            f"config.data.name={name}: no such data set in {root}; expected one of {', '.join(BUILDERS)}, or a set "
            f"that TFDS has prepared there: tfds build {name} --data_dir={root} --file_format=array_record"
        ) from error
    return Prepared(_open(folder))


def _root(data_dir: str | None) -> Path:
    return Path(local_path(data_dir or "~/tensorflow_datasets"))


def _check_originals(name: str, manual_dir: str | None, originals: Path) -> None:
    """Raise a UserError if the given folder is empty, or if none is given although the data set needs one."""
    if manual_dir and not (originals.is_dir() and any(originals.iterdir())):
        problem = "an empty folder" if originals.is_dir() else "no such folder"
        raise UserError(f"config.data.manual_dir={manual_dir}: {problem}; give the folder with the original files")
    if name == "image_folder" and not manual_dir:
        raise UserError("image_folder needs the folder with your images: --config.data.manual_dir=FOLDER")


@contextlib.contextmanager
def _reading(originals: Path) -> Iterator[None]:
    """Attribute system errors to the original files, not to the folder that is written to."""
    try:
        yield
    except OSError as error:
        raise UserError(str(cannot_read(Path(error.filename or originals), error))) from error


def _open(folder: Path) -> tfds.core.DatasetBuilder:
    """Open a prepared data set.

    Raises:
      UserError: If TFDS cannot read its metadata; the message names a file that is not valid JSON, which alone counts
        as damage.
      TrainingError: If a system error occurs.
    """
    try:
        builder = tfds.builder_from_directory(folder)
        if _FORMAT in builder.info.alternative_file_formats:  # as `tfds convert_format` leaves it
            builder.info.set_file_format(_FORMAT, override=True, override_if_initialized=True)
        return builder
    except Exception as error:
        for path in sorted(folder.glob("*.json")):
            try:
                if not json.loads(path.read_bytes()):
                    raise ValueError("it is empty")
            except OSError as problem:
                raise cannot_read(path, problem) from error
            except (ValueError, RecursionError) as problem:
                raise UserError(
                    f"{path}: damaged ({first_line(problem)}); restore it, or remove {folder} to prepare it again"
                ) from error
        if isinstance(error, OSError):
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            raise cannot_read(Path(cause.filename or folder), cause) from error
        raise _cannot_open(str(folder), error) from error


def _cannot_open(what: str, error: Exception) -> UserError:
    """Return what to raise if TFDS rejects metadata that may be sound: another version, or a feature of the user's."""
    return UserError(
        f"{what}: TFDS {tfds.__version__} cannot open it ({first_line(error)}); use the version that prepared it, or "
        "restore its metadata"
    )


def _prepare_under_lease(
    builder: Builder, name: str, originals: Path, path: Path, *, download: bool, skip_corrupt: bool
) -> None:
    """Prepare a data set unless it is already prepared, while no other process does.

    The lease is a file with host, process and heartbeat, because shared file systems may not support flock.
    """
    new_folders = [folder for folder in path.parents if not folder.exists()]
    while not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        lease = SoftFileLease(path.with_name(".preparing"), lease_duration=_LEASE)
        try:
            try:
                lease.acquire(blocking=False)
            except Timeout:
                owner = lease.owner  # None while the owner writes its name
                who = f"process {owner.pid} of {owner.hostname}" if owner else "another process"
                print(f"waiting for {who} to prepare {path.parent}", file=sys.stderr)
                lease.acquire(poll_interval=0.5)
        except FileNotFoundError:  # the other process failed and removed the folder
            continue
        try:
            if not path.exists():  # another process may have prepared it meanwhile
                print(f"preparing {name} in {path}", file=sys.stderr, flush=True)
                if builder.archive and download:
                    builder.archive.download(originals)
                _write_folder(builder, originals, path, skip_corrupt)
        except Exception:
            if not lease.compromise:  # otherwise this process was suspended and another took over
                raise
        finally:
            lease.release()
            with contextlib.suppress(OSError):  # of a folder that is not empty
                for folder in new_folders:
                    folder.rmdir()


def _write_folder(builder: Builder, originals: Path, path: Path, skip_corrupt: bool) -> None:
    """Write the shards, then the metadata, then give the folder its final name."""
    with _reading(originals):
        content = builder.read(originals)
    token = "" if builder.resumable else secrets.token_hex(4)
    folder = path.with_name(f"{path.name}.unfinished{token}")
    for left in set(path.parent.glob(f"{path.name}.unfinished*")) - {folder}:
        shutil.rmtree(left, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    try:
        _write_files(builder, content, folder, skip_corrupt)
        folder.rename(path)
    except BaseException:
        if not builder.resumable:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if builder.variant:
        _name_old_copies(path.parent)


def _name_old_copies(folder: Path) -> None:
    """Print older prepared copies of the same folder, `NAME-ORIGINALS-STATE`."""
    prefix = folder.name.rpartition("-")[0]
    old = sorted(other for other in folder.parent.glob(f"{prefix}-*") if other != folder)
    if old:
        size = sum(file.stat().st_size for other in old for file in other.rglob("*") if file.is_file())
        print(
            f"the folder has changed; {len(old)} older prepared copies take {size / 1e9:,.2f} GB. "
            f"If no run needs them: rm -r {shlex.join(map(str, old))}",
            file=sys.stderr,
            flush=True,
        )


def _write_files(builder: Builder, content: Content, folder: Path, skip_corrupt: bool) -> None:
    """Write all files of a data set to a folder.

    Raises:
      UserError: If images are unreadable and `skip_corrupt` is False; they are listed on standard error.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    features = tfds.features.FeaturesDict(content.features)
    template = tfds.core.ShardedFileTemplate(folder, dataset_name=builder.name, filetype_suffix="array_record")
    files: dict[str, dict[Path, Shard]] = {}
    for split, shards in content.splits.items():
        paths = template.replace(split=split).sharded_filepaths(len(shards))
        files[split] = dict(zip(map(Path, paths), shards, strict=True))
    for partial in set(folder.iterdir()).difference(*files.values()):
        partial.unlink()
    data_dir = folder.parents[2 if builder.variant else 1]
    missing = {file: shard for written in files.values() for file, shard in written.items() if not file.exists()}
    needed, free = sum(shard.size for shard in missing.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"config.data.dir={data_dir}: {builder.name} takes {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free; "
            "free some space or choose another"
        )
    unreadable = 0
    for split, written in files.items():
        left = {file: shard for file, shard in written.items() if file in missing}
        progress = Progress(f"preparing {split}", sum(shard.size for shard in left.values()))
        for file, shard in left.items():
            unreadable += _write_shard(file, shard, features, progress, skip_corrupt)
    if unreadable and not skip_corrupt:
        raise UserError(
            f"unreadable images, listed above: {unreadable}; repair them, move them away, or skip them: simplest-vit "
            f"prepare {builder.name} --skip_corrupt --manual_dir=FOLDER --data_dir={shlex.quote(str(data_dir))}"
        )
    splits = []
    for split, written in files.items():
        lengths = [ArrayRecordReader(str(file)).num_records() for file in written]
        if not any(lengths):
            raise UserError(f"{split}: all images are unreadable, listed above; repair some")
        expected = builder.expected.get(split, sum(lengths))
        if sum(lengths) != expected:
            print(f"{split}: {sum(lengths):,} images; the published set has {expected:,}", file=sys.stderr, flush=True)
        num_bytes = sum(file.stat().st_size for file in written)
        splits.append(tfds.core.SplitInfo(split, lengths, num_bytes, template.replace(split=split)))
    if unreadable:
        print(f"skipped unreadable images, listed above: {unreadable}", file=sys.stderr, flush=True)
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name=builder.name,
            version=tfds.core.Version(builder.version),
            data_dir=str(folder),
            module_name="",
            config_name=folder.parent.name if builder.variant else None,
        ),
        description=content.description or builder.description,
        features=features,
        supervised_keys=("image", "label"),
        disable_shuffling=True,
    )
    info.set_file_format("array_record")
    info.set_splits(tfds.core.splits.SplitDict(splits))
    info.write_to_directory(folder)


def _write_shard(
    path: Path, shard: Shard, features: tfds.features.FeaturesDict, progress: Progress, skip_corrupt: bool
) -> int:
    """Write a shard, print its unreadable images, and return their number."""
    from array_record.python.array_record_module import ArrayRecordWriter

    unreadable, partial = 0, path.with_name(f"partial-{secrets.token_hex(4)}")
    try:
        writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")  # JPEG and PNG are compressed already
        for example, image in _read_images(shard.examples()):
            if isinstance(image, str):
                print(f"unreadable image {one_line(example.name)}: {image}", file=sys.stderr, flush=True)
                unreadable += 1
            else:
                record = features.serialize_example(features.encode_example({"image": image, **example.features}))
                # The order of a map's entries differs between processes unless `deterministic` is set.
                writer.write(tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True))
            progress.add(1, example.size)
        writer.close()
    except RuntimeError as error:  # from array_record, such as a full disk
        raise (system_error(error) or error) from error
    if not unreadable or skip_corrupt:  # otherwise the next attempt reads this shard again and lists its images again
        os.replace(partial, path)
    return unreadable


def _read_images(examples: Iterator[Example]) -> Iterator[tuple[Example, bytes | str]]:
    """Read and check images on all cores, in order; yield the file content, or a description of the error."""

    def read(example: Example) -> bytes | str:
        try:
            return example.image()
        except OSError as error:
            if error.errno not in _OF_ONE_FILE:
                raise UserError(str(cannot_read(Path(one_line(example.name)), error))) from error
            return str(error.strerror)
        except Exception as error:  # reading a zip file raises errors of many kinds
            return first_line(error)

    with ThreadPoolExecutor(cpu_count()) as pool:
        while chunk := list(itertools.islice(examples, _CHUNK)):
            yield from zip(chunk, pool.map(read, chunk), strict=True)


def describe(prepared: Prepared) -> str:
    """Describe a prepared data set, its splits, classes and checksums, one per line."""
    lines = [f"{prepared.info.full_name} in {prepared.folder}: {prepared.info.description}"]
    for name, split in prepared.info.splits.items():
        lines.append(f"  {name}: {split.num_examples:,} examples, {split.num_bytes / 1e6:,.1f} MB")
    for name in prepared.labels:
        lines.append(f"  {name}: {prepared.class_line(name)}")
    lines.append(f"  mean {prepared.mean}, deviation {prepared.std}")
    for path in sorted(prepared.folder.glob("*.array_record*")):
        lines.append(f"  sha256 {sha256(path)}  {path.name}")
    return "\n".join(lines)
