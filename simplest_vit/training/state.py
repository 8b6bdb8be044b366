"""The state of a run: what changes from step to step, as arrays and as plain numbers, and the record of a checkpoint.

Orbax saves the arrays. The record beside them holds the plain numbers, and the checksums of all files, because Orbax
does not notice damage. Both change together and atomically.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from simplest_vit.files import sha256, write_json
from simplest_vit.models.layers import Constant


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelState:
    """The arrays of a model, for everything except training."""

    step: jax.Array  # int32 [], batches seen
    params: Any  # nested dict of float32 parameters, or of their moving average if the run keeps one
    constants: Any  # nested dict of the model's constants


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The arrays that training changes."""

    step: jax.Array  # int32 [], batches seen
    params: Any  # nested dict of float32 parameters
    constants: Any  # nested dict of the model's constants, kept so that a checkpoint holds the complete model
    opt_state: Any  # state of the optax chain
    ema_params: Any  # exponential moving average of `params`, or None when it is off
    # int32 [], number of steps whose loss or gradient was not finite; they advanced only `step`.
    skipped_steps: jax.Array
    skipped_in_a_row: jax.Array  # int32 [], number of steps skipped since the last update

    @classmethod
    def create(
        cls, model: nnx.Module, tx: optax.GradientTransformation, initial_params: dict[str, Any], *, average: bool
    ) -> "TrainState":
        """Create the state at step 0; `initial_params`, by module, replace those of the model.

        If `average`, it has a moving average of the parameters.
        """
        params, constants = (nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, Constant))
        params |= initial_params
        zero = jnp.zeros((), jnp.int32)
        return cls(
            step=zero,
            params=params,
            constants=constants,
            opt_state=tx.init(params),
            ema_params=params if average else None,
            skipped_steps=zero,
            skipped_in_a_row=zero,
        )

    @property
    def model_state(self) -> ModelState:
        """The part of the state that is evaluated."""
        params = self.params if self.ema_params is None else self.ema_params
        return ModelState(self.step, params, self.constants)


@dataclasses.dataclass
class RunProgress:
    """The progress of a run that a resume needs in addition to the arrays; plain JSON."""

    last_evaluation: int = 0  # step of the last completed evaluation; 0 for none
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    best_validation_accuracy: float = 0.0  # the highest over all evaluations; the weights are saved
    evaluations_without_gain: int = 0  # evaluations since the best one
    train_loss: float | None = None
    train_accuracy: float | None = None
    # Sums over the steps since the last report, so that an interruption leaves no gap between reports.
    pending_sums: dict[str, float] = dataclasses.field(default_factory=dict)
    wall_time_s: float = 0.0  # total time of the run, including earlier processes that were interrupted
    commits: list[str] = dataclasses.field(default_factory=list)  # of the code that made the steps, in order

    def record_evaluation(self, step: int, result: dict[str, float]) -> bool:
        """Record an evaluation and return whether it is the best so far, or tied with it."""
        is_first = self.validation_accuracy is None
        self.last_evaluation = step
        self.validation_loss, self.validation_accuracy = result["validation_loss"], result["validation_accuracy"]
        is_best = self.validation_accuracy >= self.best_validation_accuracy
        is_gain = is_first or self.validation_accuracy > self.best_validation_accuracy  # the first may be 0
        self.evaluations_without_gain = 0 if is_gain else self.evaluations_without_gain + 1
        self.best_validation_accuracy = max(self.best_validation_accuracy, self.validation_accuracy)
        return is_best

    def accuracy_at(self, step: int) -> float | None:
        """Return the validation accuracy of the checkpoint of this step; None if it was not evaluated."""
        return self.validation_accuracy if self.last_evaluation == step else None

    def record_training(self, scalars: dict[str, float]) -> None:
        """Record a report; it has no loss if every step was skipped."""
        self.train_loss = scalars.get("train_loss", self.train_loss)
        self.train_accuracy = scalars.get("train_accuracy", self.train_accuracy)

    def results(self) -> dict[str, float | None]:
        """Return the values for `results.json`."""
        own = ("last_evaluation", "evaluations_without_gain", "pending_sums")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in own}


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
