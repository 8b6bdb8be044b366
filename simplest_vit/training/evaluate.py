"""Evaluate the checkpoints of a finished or running training run, and restore its best model."""

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simplest_vit import preemption
from simplest_vit.data import input_pipeline
from simplest_vit.data.dataset import Dataset
from simplest_vit.errors import UserError
from simplest_vit.models import fused_attention
from simplest_vit.primary import require_same
from simplest_vit.training.checkpoint import Checkpoints
from simplest_vit.training.metrics import mean_metrics
from simplest_vit.training.run import Run, build
from simplest_vit.training.sharding import batch_sharding, create_mesh
from simplest_vit.training.state import ModelState, RunProgress
from simplest_vit.training.step import Sums, make_eval_step
from simplest_vit.training.workdir import check_data, read_run

log = logging.getLogger("simplest_vit")

_CLASSES = 10  # in a summary


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The evaluation of a checkpoint on a split: sums over its images, float64."""

    step: int
    class_names: tuple[str, ...]  # in the order of the labels
    loss: float  # the mean
    confusion: np.ndarray  # images by their class and the predicted class, [K, K]
    in_top5: float  # images whose class is among the five most probable
    bin_confidence: np.ndarray  # sum of the predicted classes' probabilities, by bin of confidence, [`step.BINS`]
    bin_correct: np.ndarray  # correct predictions by bin
    bin_count: np.ndarray  # images by bin

    @classmethod
    def of(cls, step: int, class_names: tuple[str, ...], sums: Sequence[Mapping[str, Any]]) -> "Evaluation":
        """Add up the sums of all batches of a split, as a detailed `make_eval_step` returns them."""
        names = ("confusion", "in_top5", "bin_confidence", "bin_correct", "bin_count")
        totals: dict[str, Any] = {
            name: np.sum([np.asarray(part[name], np.float64) for part in sums], axis=0) for name in names
        }
        return cls(step, class_names, mean_metrics(sums)["loss"], **totals)

    @property
    def accuracy(self) -> float:
        """The share of images whose class is predicted."""
        return float(np.trace(self.confusion) / self.confusion.sum())

    @property
    def top5_accuracy(self) -> float:
        """The share of images whose class is among the five most probable."""
        return float(self.in_top5 / self.confusion.sum())

    @property
    def class_accuracy(self) -> np.ndarray:
        """Accuracy by class, [K]; NaN for a class without images."""
        images = self.confusion.sum(axis=1)
        return np.divide(np.diag(self.confusion), images, out=np.full(len(images), np.nan), where=images > 0)

    @property
    def calibration_error(self) -> float:
        """The expected calibration error (Guo et al., arXiv 1706.04599, equation 3)."""
        return float(np.abs(self.bin_correct - self.bin_confidence).sum() / self.bin_count.sum())

    def summary(self) -> dict[str, Any]:
        """Return plain numbers by name, and the accuracy of the ten classes where it is lowest."""
        by_class = self.class_accuracy
        lowest = [i for i in np.argsort(by_class, kind="stable")[:_CLASSES] if by_class[i] >= 0]  # NaN comes last
        return {
            "step": self.step,
            "validation_accuracy": self.accuracy,
            "validation_loss": self.loss,
            "top5_accuracy": self.top5_accuracy,
            "calibration_error": self.calibration_error,
            "lowest_class_accuracies": {self.class_names[i]: float(by_class[i]) for i in lowest},
        }


def validate(run: Run, dataset: Dataset, state: ModelState) -> dict[str, float] | None:
    """Compute validation loss and accuracy; every example counts once.

    Returns:
      `validation_loss` and `validation_accuracy`, or None if a signal was received.
    """
    sums = _sum_batches(run, dataset, state, run.eval_step)
    if sums is None:
        return None
    mean = mean_metrics(sums)
    return {"validation_loss": mean["loss"], "validation_accuracy": mean["accuracy"]}


def _sum_batches(run: Run, dataset: Dataset, state: ModelState, eval_step: Any) -> list[dict[str, Any]] | None:
    """Evaluate the batches of the validation split; return None if a signal is received."""
    part = run.config.batch_size / run.config.accumulation_steps  # examples in memory at a time
    batch_size = math.ceil(part / run.mesh.size) * run.mesh.size
    batches = input_pipeline.eval_batches(dataset, batch_size=batch_size, sharding=batch_sharding(run.mesh))
    sums: list[Sums] = []
    for batch in batches:
        preemption.check()
        if preemption.received() and jax.process_count() == 1:  # several processes stop together, after a step
            return None
        sums.append(eval_step(state.params, state.constants, batch))
        jax.block_until_ready(sums[-2:-1])  # at most one batch is queued while one is computed
    return jax.device_get(sums)


def evaluate(
    workdir: str, config: ConfigDict | None = None, other_data: Mapping[str, str | None] | None = None
) -> dict[str, Evaluation]:
    """Evaluate the checkpoints of the run in `workdir` on the validation split.

    Args:
      workdir: The run's folder; nothing is written to it.
      config: None for the run's own config, adapted to the available devices. Another config may differ only in the
        location of the data and in how the run is computed (`RESUMABLE_FIELDS`).
      other_data: Fields of `config.data` that name other data of the same classes, such as `validation_split`.

    Returns:
      The evaluations of `latest` and `best`.

    Raises:
      UserError: If the folder holds no checkpoint, or one of another config or other data.
    """
    path, own, data = read_run(workdir, None if config is None else config.to_dict())
    if config is None:
        own.fsdp, own.model.attention_kernel = 1, "auto"
    fused_attention.check_devices(own.model.attention_kernel, jax.devices())
    require_same({"--workdir": os.fspath(workdir)})
    if other_data:
        with own.ignore_type():
            own.data.update(other_data, image_size=data.image_shape[0])
    mesh = create_mesh(own.fsdp)
    dataset = input_pipeline.load(own.data, mesh=mesh, only_validation=bool(other_data))
    if other_data:
        if dataset.image_shape != data.image_shape:
            raise UserError(
                f"{dataset.name} has images of {dataset.image_shape[2]} channels, the run in {path} expects "
                f"{data.image_shape[2]}; give matching images"
            )
        if dataset.class_names != data.class_names:
            found, expected = set(dataset.class_names), set(data.class_names)
            differences = f"missing: {_some(expected - found)}; unknown: {_some(found - expected)}"
            if found == expected:
                differences = "the same in another order"
            raise UserError(
                f"{dataset.name} has other classes than the run in {path} ({differences}); give the same classes"
            )
        if "name" not in other_data:  # another split of the run's own data
            check_data(path, dataclasses.replace(data, fingerprint=dataset.fingerprint))
        # The model expects images normalized as its training images were.
        dataset = dataclasses.replace(dataset, mean=data.mean, std=data.std)
    else:
        check_data(path, dataset.info)
    run = build(own, data, mesh)
    eval_step = make_eval_step(run.graphdef, run.mesh, detailed=True)
    outcome: dict[str, Evaluation] = {}
    with Checkpoints(path, create=False) as checkpoints:
        for name, choose in (("latest", checkpoints.newest), ("best", checkpoints.best)):
            state, _ = _load_model(run, checkpoints, choose)
            step = int(state.step)
            if outcome and outcome["latest"].step == step:
                outcome[name] = outcome["latest"]
                continue
            sums = _sum_batches(run, dataset, state, eval_step) or []
            outcome[name] = Evaluation.of(step, data.class_names, sums)
    return outcome


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "") or "none"


def _load_model(run: Run, checkpoints: Checkpoints, choose: Callable[[], int | None]) -> tuple[ModelState, RunProgress]:
    """Load the model of the checkpoint that `choose` finds, without the optimizer's state."""
    params = "params" if run.abstract.ema_params is None else "ema_params"
    fields = {name: getattr(run.abstract, name) for name in ("step", "constants", params)}
    found, progress = checkpoints.load(choose, fields)
    return ModelState(step=found["step"], params=found[params], constants=found["constants"]), progress


def restore_best(workdir: str, mesh: Mesh | None = None) -> tuple[Run, ModelState, float | None]:
    """Load the checkpoint with the highest validation accuracy, or the latest if none was evaluated, which is logged.

    Only the run's folder is needed, and nothing is written to it. Without a `mesh` there is one device.

    Returns:
      The run, whose model computes in float32, its best weights, and their validation accuracy if it is known.

    Raises:
      UserError: If the folder holds no checkpoint.
    """
    path, config, data = read_run(workdir)
    config.compute_dtype, config.model.attention_kernel = "float32", "xla"  # on any device
    run = build(config, data, mesh)
    with Checkpoints(path, create=False) as checkpoints:
        state, progress = _load_model(run, checkpoints, checkpoints.best)
    accuracy = progress.accuracy_at(int(state.step))
    if accuracy is None:
        log.warning("%s: no checkpoint was evaluated yet; using the latest, step %d", path, state.step)
    return run, state, accuracy
