"""The folder of a run: its config, facts about its data, checkpoints (`checkpoint.py`), metrics and results."""

import contextlib
import copy
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
from filelock import FileLock, Timeout

from simplest_vit.config import default, flatten, from_settings
from simplest_vit.data.dataset import DatasetInfo
from simplest_vit.errors import TrainingError, UserError
from simplest_vit.files import local_path, read_json, write_json, writing

log = logging.getLogger("simplest_vit")

CONFIG = "config.json"
DATASET = "dataset.json"
METRICS = "metrics.jsonl"
RESULTS = "results.json"
_LOCK = ".lock"

# The project version that last changed the content of a folder; folders of other versions are rejected. A new config
# field needs no new version if its default is the previous behaviour, because folders without it get the default.
VERSION = "0.3"

# Fields that do not change the weights after a step and may differ when a run is resumed. The intervals of evaluation
# decide which step is the best, and with `patience` when the run ends.
RESUMABLE_FIELDS = (
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
    "wandb",
)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def is_resumable(field: str) -> bool:
    """Return whether a field (dotted name) or its section is in `RESUMABLE_FIELDS`."""
    return any(f"{field}.".startswith(f"{name}.") for name in RESUMABLE_FIELDS)


def check_workdir(workdir: str, settings: dict[str, Any]) -> pathlib.Path:
    """Return the path of a folder that is free for a run, or already holds that run. Writes nothing.

    Args:
      workdir: The folder, which need not exist.
      settings: The run's config as nested dicts.

    Raises:
      UserError: If it cannot be written, is a file, or belongs to another run.
    """
    path, existing = _locate(workdir)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--workdir={workdir} cannot be written ({existing}); choose a folder you may write to")
    if (path / CONFIG).exists():
        _check_same(path, settings)
        return path
    names = ["checkpoints", METRICS, RESULTS, DATASET]
    with contextlib.suppress(UserError):  # a run that stopped before it wrote its config leaves its data facts
        DatasetInfo.from_json(read_json(path / DATASET), path / DATASET)
        names.remove(DATASET)
    for name in names:
        if (path / name).exists():
            raise UserError(f"--workdir={workdir} has {name} but no {CONFIG}; choose another folder")
    return path


def read_run(workdir: str, settings: dict[str, Any] | None = None) -> tuple[pathlib.Path, Any, DatasetInfo]:
    """Read the config and the data facts of the run in a folder; nothing else is needed. Writes nothing.

    Args:
      settings: A config, as nested dicts, that must match the run's; None takes the run's own.

    Returns:
      The folder, the checked config, and the facts about the data that the run was trained on.

    Raises:
      UserError: If the folder holds no run, a damaged run, or a run of another config or version.
    """
    path, _ = _locate(workdir)
    if not (path / CONFIG).exists():
        raise UserError(
            f"--workdir={workdir} holds no checkpoint; train there first with --config, or name another folder"
        )
    is_own = settings is None
    if settings is None:
        settings = _read_settings(path)
    else:
        _check_same(path, settings)
    data = DatasetInfo.from_json(read_json(path / DATASET), path / DATASET)
    try:
        return path, from_settings(settings, data.image_shape), data
    except UserError as error:
        if not is_own:
            raise
        problem = f"{path / CONFIG} is damaged or not of this version ({error})"
        raise UserError(f"{problem}; choose another --workdir") from error


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """Read the lines of `metrics.jsonl`: `step`, and values by tag. A truncated line is skipped."""
    lines = []
    content = (path / METRICS).read_bytes() if (path / METRICS).exists() else b""
    for text in content.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


@contextlib.contextmanager
def lock_workdir(path: pathlib.Path, settings: dict[str, Any], data: DatasetInfo) -> Iterator[None]:
    """Create the folder, record the run's config and data in it, and lock it against other processes.

    Raises:
      UserError: If it cannot be written, another process trains there, or it holds the run of another config or data.
      TrainingError: If the disk is full.
    """
    with contextlib.ExitStack() as stack:
        with writing(f"--workdir={path}"):
            path.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(FileLock(path / _LOCK, blocking=False, fallback_to_soft=False))
            except Timeout as error:
                raise UserError(
                    f"--workdir={path} is in use: another process trains there; wait until it ends, or choose another"
                ) from error
            except OSError as error:
                log.warning("%s cannot be locked (%s): make sure that no other process trains there", path, error)
            if (path / CONFIG).exists():  # another process may have written it since `check_workdir`
                _check_same(path, settings)
                check_data(path, data)
            else:
                write_json(path / DATASET, data.to_json())
            write_json(path / CONFIG, {"version": VERSION, "config": with_absolute_folders(settings)})
        yield


def check_data(path: pathlib.Path, data: DatasetInfo) -> None:
    """Raise a UserError that names what differs unless a run is resumed with the data it was started with."""
    before, now = DatasetInfo.from_json(read_json(path / DATASET), path / DATASET).to_json(), data.to_json()
    for name, value in before.items():
        if now[name] != value:
            was, found = (text if len(text) <= 60 else text[:60] + " ..." for text in (repr(value), repr(now[name])))
            raise UserError(
                f"--workdir={path} was started with other data: their {name} was {was}, now {found}; restore the data "
                "to resume that run, or choose another --workdir"
            )


def write_results(path: pathlib.Path, outcome: dict[str, Any]) -> None:
    """Write `results.json`; raise a TrainingError if it cannot be written."""
    try:
        write_json(path / RESULTS, outcome)
    except OSError as error:
        raise TrainingError(
            f"{path / RESULTS} cannot be written ({error.strerror}): training is done and its last checkpoint is "
            "intact; make room on the disk and rerun the command"
        ) from error


def environment() -> dict[str, Any]:
    """Describe device, versions and commit of this process.

    Returns:
      `device`, such as "1 x NVIDIA H200"; `versions` of Python and the main packages; `commit` of the code, with "+"
      appended if files have changed since, or None outside a git checkout.
    """
    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    kind = device.device_kind if device.platform != "cpu" else f"cpu ({platform.machine()})"
    return {
        "device": f"{jax.device_count()} x {kind}",
        "versions": {"python": platform.python_version(), **versions},
        "commit": _commit(),
    }


def with_absolute_folders(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a config with absolute folders, because a run may be resumed from another current folder."""
    settings = copy.deepcopy(settings)
    for section, key in ((settings, "init_from"), (settings["data"], "dir"), (settings["data"], "manual_dir")):
        if section[key]:
            section[key] = os.path.abspath(local_path(section[key]))
    return settings


def names_other_originals(path: pathlib.Path, settings: dict[str, Any]) -> bool:
    """Return whether a config names another folder of original files than the run in `path`, perhaps other photos."""
    return with_absolute_folders(settings)["data"]["manual_dir"] not in (None, _read_settings(path)["data.manual_dir"])


def _commit() -> str | None:
    root = pathlib.Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    # Only this project's repository: an installed package may lie inside another one.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.parent)}
    try:
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=10)
        return found.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _locate(workdir: str) -> tuple[pathlib.Path, pathlib.Path]:
    """Return the folder, and the longest part of its path that exists."""
    try:
        path = pathlib.Path(local_path(workdir)).absolute()
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
    except UserError as error:
        raise UserError(f"--workdir={error}") from error
    except OSError as error:  # such as a name that is too long
        raise UserError(f"--workdir={workdir} is not a folder path ({error.strerror}); choose another") from error
    if not existing.is_dir():
        raise UserError(f"--workdir={workdir}: {existing} is a file; name a folder")
    return path, existing


def _read_settings(path: pathlib.Path) -> dict[str, Any]:
    """Read the config of the run in a folder, flattened to dotted names."""
    content = read_json(path / CONFIG)
    version = content.get("version", "0.1")  # version 0.1 did not record its number
    if version != VERSION:
        raise UserError(
            f"--workdir={path} was made by version {version} of this project, this is {VERSION}; use version "
            f"{version}, or choose another --workdir"
        )
    try:
        flat = flatten(content["config"])
        return flatten(default(str(flat["optimizer.name"])).to_dict()) | flat
    except (AttributeError, LookupError) as error:
        raise UserError(f"{path / CONFIG} cannot be read ({error}); choose another --workdir") from error


def _check_same(path: pathlib.Path, settings: dict[str, Any]) -> None:
    old, new = _read_settings(path), flatten(with_absolute_folders(settings))
    for name in sorted(old.keys() | new.keys()):
        if is_resumable(name) or old.get(name) == new.get(name):
            continue
        raise UserError(
            f"--workdir={path} holds another run: its config.{name} is {old.get(name)!r}, now {new.get(name)!r}; set "
            "it back to resume that run, choose another --workdir, or start there from the weights of this one: "
            f"--config.init_from={path}"
        )
