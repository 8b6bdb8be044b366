"""The checkpoints of a run: asynchronous, atomic, numbered by step, proved by checksums when they are read."""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import re
import types
from collections.abc import Iterator, Sequence
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from simplest_vit.errors import TrainingError, UserError
from simplest_vit.training.state import TrainState

log = logging.getLogger("simplest_vit")

# Facts of the run that a resume goes on with, beside the arrays: plain JSON.
Progress = dict[str, Any]
AT_THE_START: Progress = {
    "best_validation_accuracy": 0.0,
    "best_step": None,  # the checkpoint with it
    "evaluated_step": 0,
    "unreported": [],  # what the steps since the last report returned: an interruption leaves no gap between reports
    "wall_time_s": 0.0,
}

_ITEMS = ("state", "progress")
_CHECKSUMS = "checksums.json"


class Checkpoints:
    """The folders `checkpoints/STEP` of a run: the latest two and the best, by Orbax. Leaving waits for the last save.

    Orbax does not notice a flipped byte. So the last file of a checkpoint has the checksums of the others, and what
    does not fit them is damaged.
    """

    def __init__(self, workdir: pathlib.Path, *, create: bool):
        """Open the checkpoints of the run in `workdir`; with `create` to write, else only to read.

        Raises:
          TrainingError: If the folder cannot be made.
        """
        self.directory = workdir.absolute() / "checkpoints"
        self._writable = create
        self._best = _Best()
        self._saving = -1
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([checkpoint_managers.LatestN(2), self._best]),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
            cleanup_tmp_directories=create,
            create=create,
        )
        with self._told("cannot be opened"):
            handlers = {"state": ocp.StandardCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()}
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        try:
            with self._told("cannot be written"):
                self._manager.close()
        except TrainingError:
            with contextlib.suppress(Exception):  # Orbax raises an error once for each of its threads
                self._manager.close()
            if error is None:
                raise

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, damaged or not, in order."""
        return list(self._manager.all_steps())

    def newest(self) -> int | None:
        """Find the newest checkpoint that is whole; damaged ones behind it are told, and removed where we may write.

        Returns:
          Its step, or None if there is no checkpoint.

        Raises:
          UserError: If all are damaged.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            damage = self._damage(step)
            if damage is None:
                for later, reason in damaged.items():
                    log.warning(
                        "checkpoint %d in %s is damaged (%s): going back to step %d",
                        later,
                        self.directory,
                        reason,
                        step,
                    )
                    if self._writable:
                        self._manager.delete(later)
                return step
            damaged[step] = damage
        if damaged:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise UserError(
                f"every checkpoint in {self.directory} is damaged ({reasons}); "
                "remove that folder to start anew, or choose another --workdir"
            )
        return None

    def progress(self, step: int) -> Progress:
        """The progress of a checkpoint that is whole."""
        return self._manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]

    def best(self) -> int | None:
        """The step of the highest validation accuracy; the newest if none was evaluated, None without a checkpoint.

        Raises:
          UserError: If all checkpoints are damaged.
        """
        newest = self.newest()
        return newest if newest is None else self.progress(newest)["best_step"] or newest

    def save(self, state: TrainState, progress: Progress, step: int) -> None:
        """Save in the background, in place of a checkpoint of the same step.

        Raises:
          TrainingError: If this one, or the one before, cannot be written.
        """
        self.wait()
        with self._told("cannot be written"):
            if step in self.steps():  # of an interruption, before the evaluation
                self._manager.delete(step)
            self._saving, self._best.step = step, progress["best_step"]
            items = {"state": ocp.args.StandardSave(state), "progress": ocp.args.JsonSave(dict(progress))}
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Wait until what was saved is on the disk.

        Raises:
          TrainingError: If it cannot be written.
        """
        with self._told("cannot be written"):
            self._manager.wait_until_finished()

    def restore(self, abstract: TrainState, step: int) -> tuple[TrainState, Progress]:
        """Load a checkpoint onto the devices that `abstract` names.

        Args:
          abstract: From `abstract_state`: the structure, shapes, dtypes and shardings to restore.
          step: Which checkpoint.

        Returns:
          The state and the progress.

        Raises:
          UserError: If the checkpoint is damaged or holds another state.
        """
        reason = self._damage(step) or _difference(self._manager.item_metadata(step)["state"].tree, abstract)
        if reason is not None:
            raise UserError(
                f"checkpoint {self.directory / str(step)} cannot be restored ({reason}); expected one written by this "
                "config; remove it to go on from an older one, or choose another --workdir"
            )
        items = {"state": ocp.args.StandardRestore(abstract), "progress": ocp.args.JsonRestore()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return restored["state"], restored["progress"]

    def _write_checksums(self) -> None:
        """Called by Orbax when all files are written, before the folder gets its name."""
        if jax.process_index() == 0:
            (folder,) = self.directory.glob(f"{self._saving}.*tmp*")
            (folder / _CHECKSUMS).write_text(json.dumps(_checksums(folder), indent=1))

    def _damage(self, step: int) -> str | None:
        """What is wrong with the files of a checkpoint, or None."""
        folder = self.directory / str(step)
        try:
            expected = dict(json.loads((folder / _CHECKSUMS).read_text()))
            found = _checksums(folder)
        except OSError as error:
            return f"{pathlib.Path(error.filename).name}: {error.strerror}"
        except (TypeError, ValueError):
            return f"{_CHECKSUMS} is not JSON"
        for name, checksum in expected.items():
            if found.get(name) != checksum:
                return f"{name} is {'changed' if name in found else 'missing'}"
        return None

    @contextlib.contextmanager
    def _told(self, failure: str) -> Iterator[None]:
        """Tell in one line what Orbax raises; it wraps a full disk in errors of many kinds."""
        try:
            yield
        except jax.errors.JaxRuntimeError:  # not of the disk: of a computation, or of another process that has gone
            raise
        except Exception as error:
            raise TrainingError(
                f"checkpoint in {self.directory} {failure} ({_reason(error)}): the run stops, the checkpoints before "
                "it are intact; make room or mend the disk and start the same command again"
            ) from error


class _Best:
    """Orbax's preservation policy for one step."""

    step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        return [checkpoint.step == self.step for checkpoint in checkpoints]


def _checksums(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file in the items of a checkpoint."""
    sums = {}
    for item in _ITEMS:
        for path in (folder / item).rglob("*"):
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
    """What went wrong in few words: the system's where TensorStore quotes an error of the system."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else " ".join(str(error).split()) or type(error).__name__
