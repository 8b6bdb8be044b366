"""The folder of a run: the config it belongs to, and its results."""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from simplest_vit.config import flatten
from simplest_vit.errors import TrainingError, UserError

CONFIG = "config.json"
RESULTS = "results.json"

# Fields that do not change what is computed, and may differ when a run goes on.
_MAY_CHANGE = (
    "checkpoint_every",
    "data.device_budget_bytes",
    "data.dir",
    "data.manual_dir",
    "data.num_workers",
    "distributed",
    "eval_every",
    "fsdp",
    "log_every",
    "max_skipped_steps",
    "profile",
)


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_results(path: pathlib.Path, outcome: dict[str, Any]) -> None:
    """Record what a run came to in its folder.

    Raises:
      TrainingError: If it cannot be written.
    """
    try:
        write_json(path / RESULTS, outcome)
    except OSError as error:
        raise TrainingError(
            f"{path / RESULTS} cannot be written ({error.strerror}): training is done and its last checkpoint is "
            "intact; make room or mend the disk and start the same command again"
        ) from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a file of a run.

    Raises:
      UserError: If it is damaged.
    """
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); choose another --workdir, or remove the damaged run"
        ) from error
    return content


def check_workdir(workdir: str, config: dict[str, Any]) -> pathlib.Path:
    """Find that a folder is free for a config's run, or holds just that run. Writes nothing.

    Args:
      workdir: Path of the folder, which may be missing.
      config: The run's config as nested dicts.

    Returns:
      The folder.

    Raises:
      UserError: If it cannot be written, is a file, or belongs to another config.
    """
    try:
        path = pathlib.Path(workdir).expanduser().absolute()
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
    except (OSError, RuntimeError, ValueError) as error:  # too long, of an unknown user, not text
        raise UserError(f"--workdir={workdir} is no path of a folder ({error}); choose another") from error
    if not existing.is_dir():
        raise UserError(f"--workdir={workdir}: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--workdir={workdir} cannot be written ({existing}); choose a folder you may write to")
    if (path / CONFIG).exists():
        _check_same(path / CONFIG, config)
    elif (path / "checkpoints").exists():
        raise UserError(f"--workdir={workdir} has checkpoints but no {CONFIG}; choose another folder")
    return path


@contextlib.contextmanager
def claim_workdir(path: pathlib.Path, config: dict[str, Any]) -> Iterator[None]:
    """Create the folder, record whose run it holds, and keep it from other processes until the end.

    Raises:
      UserError: If it cannot be written, or another process trains there.
    """
    with contextlib.ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"--workdir={path} is in use: another process trains there; wait for its end, or choose another"
                ) from error
            except OSError:
                pass  # a file system without locks
            write_json(path / CONFIG, config)
        except OSError as error:
            raise UserError(f"--workdir={path} cannot be written ({error.strerror}); choose another folder") from error
        yield


def _check_same(record: pathlib.Path, config: dict[str, Any]) -> None:
    old = flatten(read_json(record))
    new = flatten(config)
    for name in sorted(old.keys() | new.keys()):
        if name.startswith(_MAY_CHANGE) or old.get(name) == new.get(name):
            continue
        raise UserError(
            f"--workdir={record.parent} holds another run: its config.{name} is {old.get(name)!r}, now "
            f"{new.get(name)!r}; set it back to go on with that run, or choose another --workdir"
        )
