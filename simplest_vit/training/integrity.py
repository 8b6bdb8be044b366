"""Detection of damaged checkpoints, which Orbax lacks: a record beside the arrays holds the checksums of all files.

The record also holds the progress of the run, so that both change together and atomically.
"""

import hashlib
import json
import pathlib
from typing import Any

from simplest_vit.files import sha256, write_json

RECORD = "record.json"


def write_record(folder: pathlib.Path, progress: dict[str, Any]) -> None:
    """Compute the checksums of a checkpoint and write its record."""
    write_json(folder / RECORD, {"progress": progress, "checksums": _checksums(folder, progress)})


def rewrite_progress(folder: pathlib.Path, progress: dict[str, Any]) -> None:
    """Replace the progress in the record of a checkpoint."""
    checksums = read_record(folder)["checksums"] | {"progress": _digest(progress)}
    write_json(folder / RECORD, {"progress": progress, "checksums": checksums})


def read_record(folder: pathlib.Path) -> dict[str, Any]:
    """Read a record without checks; a damaged record raises one of `UNREADABLE`, here or when it is used."""
    return json.loads((folder / RECORD).read_text())


UNREADABLE = (OSError, LookupError, TypeError, ValueError, RecursionError, AttributeError)


def find_damage(folder: pathlib.Path) -> str | None:
    """Describe what is wrong with the files of a checkpoint; None if it is intact."""
    try:
        record = read_record(folder)
        expected, found = dict(record["checksums"]), _checksums(folder, record["progress"])
    except OSError as error:
        return str(error)
    except UNREADABLE:
        return f"{RECORD} is changed"
    for name in sorted(expected.keys() | {"progress"}):
        if found.get(name) != expected.get(name):
            return f"{name} is {'changed' if name in found else 'missing'}"
    return None


def _checksums(folder: pathlib.Path, progress: dict[str, Any]) -> dict[str, str]:
    """Compute the SHA-256 of every file of the arrays, and of the progress."""
    files = [path for path in (folder / "state").rglob("*") if path.is_file()]
    return {"progress": _digest(progress)} | {str(path.relative_to(folder)): sha256(path) for path in files}


def _digest(progress: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(progress, sort_keys=True).encode()).hexdigest()
