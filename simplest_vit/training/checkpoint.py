"""The checkpoints of a run: asynchronous, atomic, numbered by step, proved by checksums when they are read."""

import contextlib
import glob
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import tempfile
import types
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self, TypeVar

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from simplest_vit.errors import CheckpointError, UserError
from simplest_vit.training import distributed
from simplest_vit.training.state import TrainState
from simplest_vit.training.workdir import write_json

log = logging.getLogger("simplest_vit")

# Facts of the run that a resume goes on with, beside the arrays: plain JSON.
Progress = dict[str, Any]
_State = TypeVar("_State", TrainState, dict[str, Any])
AT_THE_START: Progress = {
    "best_validation_accuracy": 0.0,  # of the checkpoints in turn, those that an interruption leaves not among them
    "evaluated_step": 0,
    "ranked_step": 0,  # the last that was saved in turn, and evaluated: only such can be the best
    "unreported": {},  # sums over the steps since the last report: an interruption leaves no gap between reports
    "wall_time_s": 0.0,
}

_RECORD = "record.json"  # in each checkpoint, beside the folder of Orbax: the progress, and checksums of all


def has_checkpoint(workdir: pathlib.Path) -> bool:
    """Whether a run has saved anything, damaged or not."""
    return any(folder.name.isdigit() for folder in (workdir / "checkpoints").glob("*"))


class Checkpoints:
    """The folders `checkpoints/STEP` of a run: the latest two and the best, by Orbax. Leaving waits for the last save.

    Orbax does not notice a flipped byte. So the last file of a checkpoint has the checksums of the others, and what
    does not fit them is damaged. Of several processes the first decides what is, for all may see the disk differently.
    """

    def __init__(self, workdir: pathlib.Path, *, create: bool):
        """Open the checkpoints of the run in `workdir`; with `create` to write, else only to read.

        Raises:
          CheckpointError: If the folder cannot be made.
          UserError: If there is nothing to read.
        """
        self.directory = workdir.absolute() / "checkpoints"
        if not create and not self.directory.is_dir():
            raise UserError(f"--workdir={workdir} holds no checkpoint; train there first, or name another folder")
        self._writable = create
        self._best = _Best()
        self._saving: tuple[int, Progress] = (-1, AT_THE_START)
        self._whole: set[int] = set()  # steps whose checkpoint was found whole
        self._damaged: set[int] = set()  # or damaged, and told
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([checkpoint_managers.LatestN(2), self._best]),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_record, barrier_sync_fn=_barrier),
            cleanup_tmp_directories=create,
            create=create,
        )
        with self._told("cannot be opened"):
            handlers = {"state": ocp.PyTreeCheckpointHandler()}
            self._manager = _Manager(self._alias(), options=options, item_handlers=handlers)

    def _alias(self) -> pathlib.Path:
        """A path of the folder that Orbax, which looks for files by patterns, does not take for one itself."""
        if glob.escape(str(self.directory)) == str(self.directory):
            return self.directory
        folder = tempfile.mkdtemp(prefix="simplest-vit-")
        weakref.finalize(self, shutil.rmtree, folder)
        alias = pathlib.Path(folder, "checkpoints")
        if self._writable:
            self.directory.mkdir(parents=True, exist_ok=True)
        alias.symlink_to(self.directory)
        return alias

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        if error is not None and jax.process_count() > 1:
            return  # to close would wait for the others, of which one may have gone
        try:
            with self._told("cannot be written"):
                self._manager.close()
        except CheckpointError:
            with contextlib.suppress(Exception):  # Orbax raises an error once for each of its threads
                self._manager.close()
            if error is None:
                raise

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, damaged or not, in order."""
        return list(self._manager.all_steps())

    def newest(self) -> int | None:
        """Find the newest checkpoint that is whole; newer ones are damaged: reported, and set aside where we may write.

        Returns:
          Its step, or None if there is no checkpoint yet.

        Raises:
          UserError: If all are damaged, or there is none to read.
        """
        step = distributed.broadcast_from_primary(lambda: self._first_whole(reversed(self.steps())))
        self._manager.reload()
        return step

    def best(self) -> int | None:
        """Find the whole checkpoint of the highest validation accuracy, as `newest` does; if none has one, the newest.

        Raises:
          UserError: If all checkpoints are damaged.
        """
        return distributed.broadcast_from_primary(
            lambda: self._first_whole(sorted(self.steps(), key=self._rank, reverse=True))
        )

    def progress(self, step: int) -> Progress:
        """The progress of a checkpoint that is whole."""
        return self._record(step)["progress"]

    def save(self, state: TrainState, progress: Progress, step: int) -> None:
        """Save in the background; where the step is saved already, only its progress, at once and atomically.

        That is after an interruption during an evaluation: the state is the same, and may be the only one there is.

        Raises:
          CheckpointError: If this one, or the one before, cannot be written.
        """
        self.wait()
        with self._told("cannot be written"):
            self._saving = step, dict(progress)
            if step in self.steps():
                if distributed.is_primary():
                    checksums = self._record(step)["checksums"] | {"progress": _progress_checksum(progress)}
                    write_json(self.directory / str(step) / _RECORD, {"progress": progress, "checksums": checksums})
                return
            self._best.step = max([*self.steps(), step], key=self._rank)
            self._manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state)), force=True)

    def wait(self) -> None:
        """Wait until what was saved is on the disk.

        Raises:
          CheckpointError: If it cannot be written.
        """
        with self._told("cannot be written"):
            self._manager.wait_until_finished()

    def restore(self, abstract: _State, step: int) -> tuple[_State, Progress]:
        """Load a checkpoint onto the devices that `abstract` names.

        Args:
          abstract: From `abstract_state`: the structure, shapes, dtypes and shardings to restore; or a dict of some of
            its fields, and nothing else is read.
          step: Which checkpoint.

        Returns:
          The state, or those fields of it, and the progress.

        Raises:
          UserError: If the checkpoint is damaged or holds another state.
          CheckpointError: If it cannot be read.
        """
        reason = distributed.broadcast_from_primary(lambda: self._damage(step))
        if reason is None:
            with self._told("cannot be read"):
                found = self._manager.item_metadata(step)["state"].tree
            if isinstance(abstract, dict):
                found = {name: found.get(name) for name in abstract}
            reason = _difference(found, abstract)
        if reason is not None:
            raise UserError(
                f"checkpoint {self.directory / str(step)} cannot be restored ({reason}); expected one written by this "
                "config; remove it to go on from an older one, or choose another --workdir"
            )
        with self._told("cannot be read"):
            arguments = ocp.args.PyTreeRestore(
                abstract,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                partial_restore=isinstance(abstract, dict),
            )
            restored = self._manager.restore(step, args=ocp.args.Composite(state=arguments))
        return restored["state"], distributed.broadcast_from_primary(lambda: self.progress(step))

    def _write_record(self) -> None:
        """Called by Orbax when all files are written, before the folder gets its name."""
        if distributed.is_primary():
            step, progress = self._saving
            (folder,) = self.directory.glob(f"{step}.*tmp*")
            checksums = _state_checksums(folder) | {"progress": _progress_checksum(progress)}
            write_json(folder / _RECORD, {"progress": progress, "checksums": checksums})

    def _record(self, step: int) -> dict[str, Any]:
        return json.loads((self.directory / str(step) / _RECORD).read_text())

    def _rank(self, step: int) -> tuple[float, int]:
        """What the best checkpoint has most of: accuracy, if it was evaluated, and steps."""
        try:
            progress = self._saving[1] if step == self._saving[0] else self.progress(step)
            ranked = progress["ranked_step"] == step
            return (progress.get("validation_accuracy", -1.0) if ranked else -1.0), step
        except (OSError, LookupError, TypeError, ValueError):  # damaged
            return -1.0, step

    def _first_whole(self, steps: Iterable[int]) -> int | None:
        """The first of these steps whose checkpoint is whole."""
        damages: dict[int, str] = {}
        for step in steps:
            if step in self._damaged:
                continue
            damage = self._damage(step)
            if damage is None:
                for other, reason in damages.items():
                    if self._writable:
                        reason += f"; set aside as {self._set_aside(other).name}"
                    log.warning(
                        "checkpoint %d in %s is damaged (%s): going back to step %d",
                        other,
                        self.directory,
                        reason,
                        step,
                    )
                self._damaged |= damages.keys()
                return step
            damages[step] = damage
        if not self._writable and not damages:
            raise UserError(f"{self.directory} holds no finished checkpoint; go on training there first")
        if damages:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in damages.items())
            raise UserError(
                f"every checkpoint in {self.directory} is damaged ({reasons}); "
                "remove that folder to start anew, or choose another --workdir"
            )
        return None

    def _set_aside(self, step: int) -> pathlib.Path:
        """Rename a checkpoint so that Orbax does not see it: not removed, for it may only be unreadable for now."""
        folder = self.directory / str(step)
        aside = folder.with_name(f"{step}.damaged")
        with self._told("cannot be renamed"):
            if aside.exists():
                shutil.rmtree(aside)
            return folder.rename(aside)

    def _damage(self, step: int) -> str | None:
        """What is wrong with the files of a checkpoint, or None."""
        if step in self._whole:
            return None
        try:
            record = self._record(step)
            expected = dict(record["checksums"])
            found = _state_checksums(self.directory / str(step)) | {"progress": _progress_checksum(record["progress"])}
        except OSError as error:
            return str(error)
        except (LookupError, TypeError, ValueError):
            return f"{_RECORD} is changed"
        for name in sorted(expected.keys() | {"progress"}):
            if found.get(name) != expected.get(name):
                return f"{name} is {'changed' if name in found else 'missing'}"
        self._whole.add(step)
        return None

    @contextlib.contextmanager
    def _told(self, failure: str) -> Iterator[None]:
        """Tell in one line what Orbax raises; it wraps a full disk in errors of many kinds."""
        try:
            yield
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, jax.errors.JaxRuntimeError):
                    raise cause from None  # not of the disk: of a computation, or of another process that has gone
                cause = cause.__cause__ or cause.__context__
            raise CheckpointError(
                f"checkpoint in {self.directory} {failure} ({_reason(error)}): the run stops, the checkpoints before "
                "it are intact; make room or mend the disk and start the same command again"
            ) from error


class _Manager(ocp.CheckpointManager):
    """Orbax's, but it does not ask JAX whether to stop: that is asked once after each step (`Interruption`)."""

    def reached_preemption(self, step: int) -> bool:
        return False


class _Best:
    """Orbax's preservation policy for one step."""

    step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        return [checkpoint.step == self.step for checkpoint in checkpoints]


def _barrier(*, key: str, timeout_ms: int) -> None:
    """Orbax's own; but a process that has failed does not wait for the others first (20 minutes): it shall tell."""
    if sys.exception() is None:
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _progress_checksum(progress: Progress) -> str:
    return hashlib.sha256(json.dumps(progress, sort_keys=True).encode()).hexdigest()


def _state_checksums(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file of the arrays in a checkpoint."""
    sums = {}
    for path in (folder / "state").rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                sums[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _difference(found: Any, expected: Any) -> str | None:
    """The first difference between two trees of what has a shape and a dtype, or None."""

    def leaves(tree: Any) -> dict[str, str]:
        return {
            jax.tree_util.keystr(path, simple=True, separator="."): f"{leaf.dtype} {list(leaf.shape)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    there, here = leaves(found), leaves(expected)
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            return f"its {name} is {there.get(name, 'missing')}, here {here.get(name, 'missing')}"
    return None


def _reason(error: BaseException) -> str:
    """What went wrong in few words: the system's, without a path, where it is an error of the system."""
    code = re.search(r"(?:os_error_code='|\[Errno )(\d+)", str(error))  # as TensorStore and Python quote it
    return os.strerror(int(code[1])) if code else " ".join(str(error).split()) or type(error).__name__
