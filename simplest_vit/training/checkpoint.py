"""The checkpoints of a run, saved by Orbax: asynchronous, atomic, numbered by step, and verified when read."""

import contextlib
import dataclasses
import glob
import itertools
import logging
import math
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, TypeVar

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, CustomSteps, LatestN

from simplest_vit.errors import CheckpointError, UserError
from simplest_vit.primary import broadcast_from_primary, is_primary
from simplest_vit.training.state import (
    UNREADABLE,
    RunProgress,
    TrainState,
    find_damage,
    read_record,
    rewrite_progress,
    write_record,
)

log = logging.getLogger("simplest_vit")

_State = TypeVar("_State", TrainState, dict[str, Any])

_RESUME = "the checkpoints before it are intact; make room on the disk and rerun the command to resume"
# A training run may remove a checkpoint while another process reads it.
_TRIES = 5
_REMOVAL_S = 0.5


def has_checkpoint(workdir: pathlib.Path) -> bool:
    """Return whether a run has saved anything, damaged or not."""
    return any(folder.name.isdigit() for folder in (workdir / "checkpoints").glob("*"))


class Checkpoints:
    """The folders `checkpoints/STEP` of a run: the latest two and the best. Exiting waits for the last save.

    Process 0 decides which checkpoints are damaged, because each process may see a different state of the disk.
    """

    def __init__(self, workdir: pathlib.Path, *, create: bool):
        """Open the checkpoints of the run in `workdir`: for writing if `create`, else read-only.

        Raises:
          CheckpointError: If the folder cannot be created.
          UserError: If there is nothing to read.
        """
        self.directory = workdir.absolute() / "checkpoints"
        if not create and not self.directory.is_dir():
            raise UserError(f"--workdir={workdir} holds no checkpoint; train there first, or name another folder")
        self._writable = create
        self._policy = AnyPreservationPolicy([LatestN(2)])  # not `BestN`, which assumes that metrics never change
        self._saving = (-1, RunProgress())
        self._intact: set[int] = set()  # steps whose checkpoint was found intact
        self._damaged: set[int] = set()  # or damaged, and reported
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_record, barrier_sync_fn=_barrier),
            cleanup_tmp_directories=create,
            create=create,
        )
        with self._translate_errors("cannot be opened"):
            handlers = {"state": ocp.PyTreeCheckpointHandler()}
            self._manager = _Manager(self._alias(), options=options, item_handlers=handlers)

    def _alias(self) -> pathlib.Path:
        """Return a path of the folder without glob characters, because Orbax finds files by patterns."""
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
            return  # closing would wait for the others, one of which may be gone
        try:
            with self._translate_errors("cannot be written"):
                self._manager.close()
        except CheckpointError:
            with contextlib.suppress(Exception):  # Orbax raises an error once in each of its threads
                self._manager.close()
            if error is None:
                raise

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, damaged or not, in order."""
        return list(self._manager.all_steps())

    def newest(self) -> int | None:
        """Find the newest intact checkpoint. Newer, damaged ones are reported, and renamed if opened for writing.

        Returns:
          Its step, or None if there is no checkpoint yet.

        Raises:
          UserError: If all are damaged, or there is none.
        """
        step = broadcast_from_primary(lambda: self._first_intact(reversed(self.steps())))
        self._manager.reload()
        return step

    def best(self) -> int | None:
        """Find the intact checkpoint with the highest validation accuracy, or the newest if none was evaluated.

        Raises:
          UserError: If all checkpoints are damaged.
        """
        return broadcast_from_primary(lambda: self._first_intact(sorted(self.steps(), key=self._rank, reverse=True)))

    def progress(self, step: int) -> RunProgress:
        """Read the progress of an intact checkpoint."""
        return RunProgress(**read_record(self.directory / str(step))["progress"])

    def save(self, state: TrainState, progress: RunProgress, step: int) -> None:
        """Save in the background. If the step is already saved, replace only its progress, immediately and atomically.

        The latter happens after an interruption during an evaluation: the state is the same, and may be the only copy.

        Raises:
          CheckpointError: If this checkpoint, or the previous one, cannot be written.
        """
        self.wait()
        with self._translate_errors("cannot be written"):
            self._saving = step, dataclasses.replace(progress)
            if step in self.steps():
                if is_primary():
                    rewrite_progress(self.directory / str(step), dataclasses.asdict(progress))
                return
            ranks = sorted(map(self._rank, [*self.steps(), step]))
            unreadable = [other for accuracy, other in ranks if accuracy == math.inf]
            for other in unreadable:
                log.warning("record of checkpoint %d in %s cannot be read: keeping it", other, self.directory)
            _, best = ranks[-1 - len(unreadable)]
            self._policy.policies = [LatestN(2), CustomSteps([best, *unreadable])]
            self._manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state)), force=True)

    def wait(self) -> None:
        """Wait until the last save is on disk; raise a CheckpointError if it cannot be written."""
        with self._translate_errors("cannot be written"):
            self._manager.wait_until_finished()

    def restore(self, abstract: _State, step: int) -> tuple[_State, RunProgress]:
        """Load a checkpoint onto the devices that `abstract` names.

        Args:
          abstract: From `Run.abstract`: the structure, shapes, dtypes and shardings to restore. If it is a dict of
            some of the fields, only these are read.

        Returns:
          The state, or those fields of it, and the progress.

        Raises:
          UserError: If the checkpoint is damaged or holds another state.
          CheckpointError: If it cannot be read.
        """
        reason = broadcast_from_primary(lambda: self._damage(step))
        if reason is None:
            with self._translate_errors("cannot be read", "check the disk and rerun the command"):
                found = self._manager.item_metadata(step)["state"].tree
            if isinstance(abstract, dict):
                found = {name: found.get(name) for name in abstract}
            reason = _difference(found, abstract)
        if reason is not None:
            raise UserError(
                f"checkpoint {self.directory / str(step)} cannot be restored ({reason}); expected one written by this "
                "config; return to the versions of code and libraries that wrote it, or choose another --workdir"
            )
        with self._translate_errors("cannot be read", "check the disk and rerun the command"):
            arguments = ocp.args.PyTreeRestore(
                abstract,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                partial_restore=isinstance(abstract, dict),
            )
            restored = self._manager.restore(step, args=ocp.args.Composite(state=arguments))
        record = broadcast_from_primary(lambda: read_record(self.directory / str(step)))
        return restored["state"], RunProgress(**record["progress"])

    def load(self, choose: Callable[[], int | None], abstract: dict[str, Any]) -> tuple[dict[str, Any], RunProgress]:
        """Restore the checkpoint that `choose` finds; retry if it is removed in the meantime.

        Raises:
          UserError: If there is no intact checkpoint, or it holds another state.
        """
        tries = 0
        while True:
            step, tries = choose() or 0, tries + 1
            try:
                return self.restore(abstract, step)
            except (UserError, CheckpointError):
                if tries == _TRIES or not self._is_removed(step):
                    raise

    def _is_removed(self, step: int) -> bool:
        """Return whether a training run that owns this folder has just removed a checkpoint."""
        if self._writable:
            return False
        time.sleep(_REMOVAL_S)
        if (self.directory / str(step)).exists():
            return False
        self._manager.reload()
        self._intact.discard(step)
        return True

    def _write_record(self) -> None:
        """Write the record; Orbax calls this when all files are written, before the folder gets its final name."""
        if is_primary():
            step, progress = self._saving
            (folder,) = self.directory.glob(f"{step}.*tmp*")
            write_record(folder, dataclasses.asdict(progress))

    def _rank(self, step: int) -> tuple[float, int]:
        """Return the sort key of the best checkpoint: validation accuracy (-1 if not evaluated), then the step.

        A step whose record cannot be read, perhaps only temporarily, has infinite accuracy, because it may be the best.
        """
        try:
            progress = self._saving[1] if step == self._saving[0] else self.progress(step)
            accuracy = progress.accuracy_at(step)
        except UNREADABLE:
            accuracy = math.inf
        return -1.0 if accuracy is None else accuracy, step

    def _first_intact(self, steps: Iterable[int]) -> int | None:
        """Find the first of these steps whose checkpoint is intact."""
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
            if not self._is_removed(step):
                damages[step] = damage
        if damages:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in damages.items())
            raise UserError(
                f"every checkpoint in {self.directory} is damaged ({reasons}); check the disk, restore a copy, or "
                "choose another --workdir"
            )
        if not self._writable:
            raise UserError(f"{self.directory} holds no finished checkpoint; resume training there first")
        return None

    def _set_aside(self, step: int) -> pathlib.Path:
        """Rename a checkpoint so that Orbax ignores it; keep it, because it may be unreadable only temporarily."""
        folder = self.directory / str(step)
        names = (folder.with_name(f"{step}.damaged{number or ''}") for number in itertools.count())
        with self._translate_errors("cannot be renamed"):
            return folder.rename(next(aside for aside in names if not aside.exists()))

    def _damage(self, step: int) -> str | None:
        """Describe what is wrong with the files of a checkpoint; None if it is intact, which is checked only once."""
        damage = None if step in self._intact else find_damage(self.directory / str(step))
        if damage is None:
            self._intact.add(step)
        return damage

    @contextlib.contextmanager
    def _translate_errors(self, failure: str, remedy: str = _RESUME) -> Iterator[None]:
        """Turn an error of Orbax into a one-line error; Orbax reports a full disk as errors of many kinds."""
        try:
            yield
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, jax.errors.JaxRuntimeError):
                    raise cause from None  # not a disk error, but a failed computation or a lost process
                cause = cause.__cause__ or cause.__context__
            raise CheckpointError(f"checkpoint in {self.directory} {failure} ({_reason(error)}): {remedy}") from error


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, but it does not ask JAX whether to stop: `interruption` asks once after each step."""

    def reached_preemption(self, step: int) -> bool:
        return False


def _barrier(*, key: str, timeout_ms: int) -> None:
    """Orbax's barrier, but a process that has failed does not wait 20 minutes for the others before it reports."""
    if sys.exception() is None:
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _difference(found: Any, expected: Any) -> str | None:
    """Describe the first difference in shape or dtype between two trees, or return None."""

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
    """Describe an error in a few words; for a system error, use the system's message without a path."""
    code = re.search(r"(?:os_error_code='|\[Errno )(\d+)", str(error))  # as TensorStore and Python quote it
    return os.strerror(int(code[1])) if code else " ".join(str(error).split()) or type(error).__name__
