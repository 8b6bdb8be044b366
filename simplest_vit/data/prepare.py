"""Prepare data sets: from the original files to TFDS's array_record files, without TensorFlow.

A prepared data set is complete or absent, never half.
"""

import contextlib
import errno
import hashlib
import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from filelock import SoftFileLease, Timeout

from simplest_vit.data.builders import BUILDERS
from simplest_vit.errors import UserError

_LEASE = 60  # seconds of silence after which a process that prepares counts as gone; it tells of itself every 20


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
      The builder of the prepared data set.

    Raises:
      UserError: If the name is unknown, the originals are missing or damaged, or the disk cannot take it.
    """
    if name not in BUILDERS:
        raise UserError(f"data.name={name}: unknown; expected one of {', '.join(BUILDERS)}")
    try:
        root = Path(data_dir or "~/tensorflow_datasets").expanduser()
        originals = None if manual_dir is None else Path(manual_dir).expanduser()
    except RuntimeError as error:  # of an unknown user
        raise UserError(f"data.dir={data_dir}, data.manual_dir={manual_dir}: {error} Name another folder") from error
    try:
        if originals is not None and not (originals.is_dir() and any(originals.iterdir())):
            problem = "an empty folder" if originals.is_dir() else "no such folder"
            raise UserError(f"data.manual_dir={manual_dir}: {problem}; give the one with the original files")
        if name == "image_folder" and originals is None:
            raise UserError("data.manual_dir: not set; image_folder needs the folder with train/ and val/")
        while True:
            builder = _builder(name, root, originals, skip_corrupt)
            exists = Path(builder.data_path).exists()  # asked first, for another process may finish in between
            if builder.is_prepared():
                return builder
            if exists:
                raise damaged(Path(builder.data_path), FileNotFoundError("dataset_info.json is missing"))
            lease = SoftFileLease(Path(builder.data_path).with_name(".preparing"), lease_duration=_LEASE)
            try:
                with _held(lease):
                    builder = _builder(name, root, originals, skip_corrupt)
                    if not builder.is_prepared():  # or another process has been faster
                        _prepare(builder, root, originals)
            except Exception:
                if not lease.compromise:  # else this process stood still, and another has taken over
                    raise
    except Exception as error:
        cause = _cause(error)
        if isinstance(cause, UserError):
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        problem = cause.strerror or str(cause)
        if originals and cause.filename and Path(str(cause.filename)).is_relative_to(originals):
            raise UserError(f"{cause.filename}: cannot be read ({problem}); repair or remove it") from error
        remedy = {errno.ENOSPC: "free some space or ", errno.EDQUOT: "free some space or "}.get(cause.errno or 0, "")
        if cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = "make it writable or "
        raise UserError(f"data.dir={root}: cannot prepare {name} there ({problem}); {remedy}choose another") from error


def damaged(folder: Path, error: Exception) -> UserError:
    """What to raise where TFDS stumbles over the metadata of a prepared data set.

    Args:
      folder: The data set's, or one above it.
      error: What TFDS raised.

    Returns:
      The error, which names the file if it is one that is no JSON.
    """
    place = folder
    for path in sorted(folder.rglob("*.json")):
        try:
            if not json.loads(path.read_bytes()):
                raise ValueError("it is empty")
        except (OSError, ValueError) as problem:
            place, folder, error = path, path.parent, problem
            break
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"{place}: damaged ({reason}); remove {folder} to prepare it anew")


def _builder(name: str, root: Path, originals: Path | None, skip_corrupt: bool) -> tfds.core.DatasetBuilder:
    options: dict[str, Any] = {"skip_corrupt": True} if skip_corrupt else {}
    if name == "image_folder":
        options["folder"] = originals
    try:
        return BUILDERS[name](data_dir=root, **options)
    except (UserError, OSError):
        raise
    except Exception as error:  # of what is prepared there already
        raise damaged(root / BUILDERS[name].name, error) from error


@contextlib.contextmanager
def _held(lease: SoftFileLease) -> Iterator[None]:
    """Hold a lease: a file with host, process and heartbeat, since file systems of several hosts may not know flock.

    Then what a process that was killed has left is removed.
    """
    folder = Path(lease.lock_file).parent
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lease.acquire(blocking=False)
    except Timeout:
        if owner := lease.owner:
            print(f"waiting for process {owner.pid} of {owner.hostname} to prepare {folder}", file=sys.stderr)
        lease.acquire(poll_interval=0.5)
    try:
        for unfinished in folder.glob("incomplete.*"):  # TFDS's name for a folder it is writing
            shutil.rmtree(unfinished)
        yield
    finally:
        lease.release()


def _prepare(builder: tfds.core.DatasetBuilder, root: Path, originals: Path | None) -> None:
    """Download the originals unless they are given, and write the data set."""
    if originals is None:
        originals = root / "downloads"
        if hasattr(builder, "ARCHIVE"):
            builder.ARCHIVE.download(originals)
    tfds.disable_progress_bar()
    print(f"preparing {builder.name} in {builder.data_path}", file=sys.stderr, flush=True)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS says the same in other words, where results belong
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=originals), file_format="array_record"
        )


def _cause(error: BaseException) -> BaseException:
    """What TFDS wrapped: while writing, it replaces an exception by one with a longer message."""
    while error.__cause__ is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


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
