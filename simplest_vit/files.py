"""Local paths, checksums, and atomic writing of files."""

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import pathlib
import re
import secrets
from collections.abc import Iterable, Iterator
from typing import Any

from simplest_vit.errors import TrainingError, UserError

# Linux allows 4,096 bytes; files below a folder need the rest.
_LONGEST_PATH = 3500


def local_path(path: str | os.PathLike[str]) -> str:
    """Expand `~`, and accept `file:///PATH` for `/PATH`.

    Raises:
      UserError: If the text is not a local path: it is empty, has another scheme, such as gs://, names an unknown user,
        is not UTF-8, or is too long.
    """
    text = os.fspath(path)
    if not text:
        raise UserError("'': the path is empty; give a path")
    if local := re.match("file://(localhost)?/+", text):
        text = "/" + text[local.end() :]
    if scheme := re.match(r"(file://[^/]+|[a-z][a-z0-9+.-]+:)/", text, re.IGNORECASE):
        raise UserError(f"{text}: {scheme[1]} is not supported; give a local path, such as a mounted bucket")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise UserError(f"{text}: there is no such user; give another path")
    if "\0" in path or any("\ud800" <= character <= "\udfff" for character in path):
        raise UserError(f"{text}: the name is not valid UTF-8; rename it or give another path")
    if len(os.fsencode(os.path.abspath(path))) > _LONGEST_PATH:
        raise UserError(f"{text[:60]}...: the path is longer than {_LONGEST_PATH:,} bytes; give a shorter one")
    return path


def sha256(path: pathlib.Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def writing(what: str, remedy: str = "choose another folder") -> Iterator[None]:
    """Turn a system error while writing into a `UserError`, or a `TrainingError` if the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TrainingError(
                f"{what} cannot be written ({error.strerror}): make room on the disk and rerun the command"
            ) from error
        raise UserError(f"{what} cannot be written ({error.strerror}); {remedy}") from error


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Write a JSON file; see `write_file`."""
    write_file(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def write_csv(path: pathlib.Path, rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file in UTF-8; bytes of file names that are not UTF-8 are escaped. See `write_file`."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_file(path, text.getvalue().encode(errors="backslashreplace"))


def write_file(path: pathlib.Path, content: bytes) -> None:
    """Write a file atomically, even if the power fails.

    A link stays and its target is written. A pipe or a device, such as /dev/stdout, is written directly.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    path = pathlib.Path(os.path.realpath(path))
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")  # no file of the user's
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # Windows and some file systems do not support it
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # makes the new name durable
        finally:
            os.close(folder)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON object; a UserError if the file cannot be read or holds anything else."""
    try:
        content = json.loads(path.read_text())
    except RecursionError as error:
        raise UserError(f"{path} cannot be read (it is nested too deeply); the file is damaged") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); the file is damaged") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} cannot be read (it holds no JSON object); the file is damaged")
    return content
