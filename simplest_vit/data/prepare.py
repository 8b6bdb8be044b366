"""Prepares data sets: from the original files to TFDS's array_record files, without TensorFlow.

A prepared data set is complete or absent, never half.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from google.protobuf.json_format import ParseError

from simplest_vit.data.builders import BUILDERS
from simplest_vit.errors import UserError


def prepare(
    name: str, data_dir: str | None = None, manual_dir: str | None = None, *, skip_corrupt: bool = False
) -> tfds.core.DatasetBuilder:
    """Prepares a data set unless it is there.

    Args:
      name: a name in `BUILDERS`.
      data_dir: where TFDS data sets live; None for ~/tensorflow_datasets.
      manual_dir: a folder with the original files; None to download them to `data_dir`/downloads.
      skip_corrupt: whether to leave damaged images out instead of failing.

    Returns:
      The builder of the prepared data set.

    Raises:
      UserError: the name is unknown, the originals are missing or damaged, or the disk cannot take it.
    """
    if name not in BUILDERS:
        raise UserError(f"data.name={name}: unknown; expected one of {', '.join(BUILDERS)}")
    try:
        root = Path(data_dir or "~/tensorflow_datasets").expanduser()
        originals = None if manual_dir is None else Path(manual_dir).expanduser()
    except RuntimeError as error:  # of an unknown user
        raise UserError(f"data.dir={data_dir}, data.manual_dir={manual_dir}: {error} Name another folder") from error
    if originals is not None and not (originals.is_dir() and any(originals.iterdir())):
        problem = "an empty folder" if originals.is_dir() else "no such folder"
        raise UserError(f"data.manual_dir={manual_dir}: {problem}; give the one with the original files")
    options: dict[str, Any] = {"skip_corrupt": True} if skip_corrupt else {}
    if name == "image_folder":
        if originals is None:
            raise UserError("data.manual_dir: not set; image_folder needs the folder with train/ and val/")
        options["folder"] = originals
    try:
        builder = BUILDERS[name](data_dir=root, **options)
    except (ValueError, ParseError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"data.dir={root}: {name} is damaged there ({reason}); remove it to prepare it anew") from error
    if builder.is_prepared():
        return builder
    try:
        with _lock(Path(builder.data_path).parent):
            builder = BUILDERS[name](data_dir=root, **options)
            if not builder.is_prepared():  # or another process has been faster
                _prepare(builder, root, originals)
    except Exception as error:
        cause = _cause(error)
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, OSError):
            remedy = "free some space" if cause.errno == errno.ENOSPC else "make it writable"
            raise UserError(
                f"data.dir={root}: cannot prepare {name} there ({cause.strerror or cause}); {remedy} or choose another"
            ) from error
        raise
    return builder


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Lets one process at a time prepare a data set, and removes what one that was killed has left."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for unfinished in folder.glob("incomplete.*"):  # TFDS's name for a folder it is writing
            shutil.rmtree(unfinished)
        yield
    finally:
        os.close(handle)


def _prepare(builder: tfds.core.DatasetBuilder, root: Path, originals: Path | None) -> None:
    """Downloads the originals unless they are given, and writes the data set."""
    if originals is None:
        originals = root / "downloads"
        if hasattr(builder, "ARCHIVE"):
            builder.ARCHIVE.download(originals)
    tfds.disable_progress_bar()
    print(f"preparing {builder.name} in {builder.data_path}", file=sys.stderr, flush=True)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=originals), file_format="array_record"
    )


def _cause(error: BaseException) -> BaseException:
    """Returns what TFDS wrapped: while writing, it replaces an exception by one with a longer message."""
    while error.__cause__ is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


def describe(builder: tfds.core.DatasetBuilder) -> str:
    """Returns the splits, classes and checksums of a prepared data set, a line each."""
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
