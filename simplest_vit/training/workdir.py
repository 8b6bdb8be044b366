"""The folder of a run: the config and the data it belongs to, checkpoints (`checkpoint.py`), and its results."""

import contextlib
import fcntl
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from simplest_vit.config import check, default, flatten
from simplest_vit.data.dataset import DatasetInfo
from simplest_vit.errors import TrainingError, UserError

log = logging.getLogger("simplest_vit")

CONFIG = "config.json"
DATASET = "dataset.json"
RESULTS = "results.json"
_LOCK = ".lock"

# The version of the project at which what a folder holds last changed, so that older folders are refused. A new field
# of the config needs none where its default is what the code did before: folders without it are read with the default.
VERSION = "0.2"

# Fields that do not change what is computed, and may differ when a run goes on.
MAY_CHANGE = (
    "checkpoint_every",
    "checkpoint_minutes",
    "compilation_cache",
    "data.device_budget_bytes",
    "data.dir",
    "data.manual_dir",
    "data.num_workers",
    "distributed",
    "eval_every",
    "fsdp",
    "log_every",
    "max_skipped_steps",
    "model.attention_kernel",
    "profile",
)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def may_change(field: str) -> bool:
    """Whether a field, by dotted name, is one of `MAY_CHANGE` or in a section that is."""
    return any(f"{field}.".startswith(f"{name}.") for name in MAY_CHANGE)


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Write a file whole or not at all, also where the power fails."""
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name
    except OSError:
        pass  # a file system that cannot
    finally:
        os.close(folder)


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
    path, existing = _locate(workdir)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--workdir={workdir} cannot be written ({existing}); choose a folder you may write to")
    if (path / CONFIG).exists():
        _check_same(path, config)
    elif (path / "checkpoints").exists():
        raise UserError(f"--workdir={workdir} has checkpoints but no {CONFIG}; choose another folder")
    return path


def read_run(workdir: str, config: ConfigDict | None = None) -> tuple[pathlib.Path, ConfigDict, DatasetInfo]:
    """Read what a folder remembers of its run. Writes nothing.

    Args:
      workdir: The folder.
      config: A config that must be that run's; None takes the run's own.

    Returns:
      The folder, a copy of the config, and what the run was trained on.

    Raises:
      UserError: If the folder holds no run, a damaged one, or one of another config or version.
    """
    path, _ = _locate(workdir)
    if not (path / CONFIG).exists():
        raise UserError(f"--workdir={workdir} holds no checkpoint; train there first, or name another folder")
    if config is None:
        flat = _read_config(path)
        config = default(str(flat["optimizer.name"]))
        with config.ignore_type():
            config.update_from_flattened_dict(flat)
        try:
            check(config)
        except UserError as error:
            raise UserError(f"{path / CONFIG} is damaged ({error}); choose another --workdir") from error
    else:
        _check_same(path, config.to_dict())
        config = config.copy_and_resolve_references()
    return path, config, DatasetInfo.from_json(read_json(path / DATASET), path / DATASET)


@contextlib.contextmanager
def claim_workdir(path: pathlib.Path, config: dict[str, Any], data: DatasetInfo) -> Iterator[None]:
    """Create the folder, record whose run it holds, and keep it from other processes until the end.

    Raises:
      UserError: If it cannot be written, another process trains there, or it holds the run of another config or data.
    """
    with contextlib.ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            # Of a file that is open for writing, NFS keeps a lock between hosts as well.
            file = stack.enter_context((path / _LOCK).open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"--workdir={path} is in use: another process trains there; wait for its end, or choose another"
                ) from error
            except OSError as error:
                log.warning("%s cannot be locked (%s): see to it that no other process trains there", path, error)
            if (path / CONFIG).exists():  # perhaps only since `check_workdir`, which was not alone
                _check_same(path, config)
                check_data(path, data)
            else:
                write_json(path / DATASET, data.to_json())
            write_json(path / CONFIG, {"version": VERSION, "config": config})
        except OSError as error:
            raise UserError(f"--workdir={path} cannot be written ({error.strerror}); choose another folder") from error
        yield


def check_data(path: pathlib.Path, data: DatasetInfo) -> None:
    """Check that a run goes on with the data that it began with.

    Raises:
      UserError: Names the first thing that differs.
    """
    began, now = DatasetInfo.from_json(read_json(path / DATASET), path / DATASET).to_json(), data.to_json()
    for name, value in began.items():
        if now[name] != value:
            was, found = (text if len(text) <= 60 else text[:60] + " ..." for text in (repr(value), repr(now[name])))
            raise UserError(
                f"--workdir={path} began with other data: their {name} was {was}, now {found}; set the data back to go "
                "on with that run, or choose another --workdir"
            )


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


def environment() -> dict[str, Any]:
    """Device, versions and commit of this process.

    Returns:
      `device`, such as "1 x NVIDIA H200"; `versions` of Python and the packages that compute; `commit` of the code,
      with "+" appended where files were changed since, or None outside of a git checkout.
    """
    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    kind = device.device_kind if device.platform != "cpu" else f"cpu ({platform.machine()})"
    return {
        "device": f"{jax.device_count()} x {kind}",
        "versions": {"python": platform.python_version(), **versions},
        "commit": _commit(),
    }


def _commit() -> str | None:
    root = pathlib.Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    # Of this project: an installed package may lie below the repository of another.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.parent)}
    try:
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=10)
        return found.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _locate(workdir: str) -> tuple[pathlib.Path, pathlib.Path]:
    """The folder, and as much of its path as exists."""
    try:
        path = pathlib.Path(workdir).expanduser().absolute()
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
    except (OSError, RuntimeError, ValueError) as error:  # too long, of an unknown user, not text
        raise UserError(f"--workdir={workdir} is no path of a folder ({error}); choose another") from error
    if not existing.is_dir():
        raise UserError(f"--workdir={workdir}: {existing} is a file; name a folder")
    return path, existing


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    """The config of a folder's run, by dotted name."""
    content = read_json(path / CONFIG)
    version = content.get("version", "0.1")  # which wrote none
    if version != VERSION:
        raise UserError(
            f"--workdir={path} was made by version {version} of this project; this is {VERSION} and cannot go on: "
            f"use version {version}, or choose another --workdir"
        )
    try:
        flat = flatten(content["config"])
        return flatten(default(str(flat["optimizer.name"])).to_dict()) | flat
    except (AttributeError, LookupError) as error:
        raise UserError(f"{path / CONFIG} cannot be read ({error}); choose another --workdir") from error


def _check_same(path: pathlib.Path, config: dict[str, Any]) -> None:
    old, new = _read_config(path), flatten(config)
    for name in sorted(old.keys() | new.keys()):
        if may_change(name) or old.get(name) == new.get(name):
            continue
        raise UserError(
            f"--workdir={path} holds another run: its config.{name} is {old.get(name)!r}, now {new.get(name)!r}; "
            "set it back to go on with that run, or choose another --workdir"
        )
