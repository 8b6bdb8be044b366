"""The metrics of a run on the host: a meter for the steps between reports, log lines, and a bar on a terminal.

All are kept as sums and counts, so that batches of any size add up to the whole.
"""

import contextlib
import datetime
import logging
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from simplest_vit.errors import TrainingError
from simplest_vit.primary import is_primary
from simplest_vit.training.step import Sums

log = logging.getLogger("simplest_vit")

# Steps that may be queued on the device: enough to keep it busy, few enough that their batches fit beside the model.
_STEPS_IN_FLIGHT = 2
_SUMS = ("loss", "correct", "count")
_NOT_GAUGES = (*_SUMS, "skipped_steps", "skipped_in_a_row")

# Names in `results.json` and in a report -> tags, which TensorBoard groups by the part before the slash.
_TAGS = {
    "train_loss": "loss/train",
    "validation_loss": "loss/validation",
    "train_accuracy": "accuracy/train",
    "validation_accuracy": "accuracy/validation",
    "best_validation_accuracy": "accuracy/best_validation",
    **{name: f"speed/{name}" for name in ("step_time", "steps_per_second", "images_per_second")},
    **{name: f"optimizer/{name}" for name in ("grad_norm", "skipped_steps", "rejected_roots", "worst_residual")},
}


def add_sums(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Add up sums in float64 on the host."""
    return {name: math.fsum(float(part[name]) for part in parts) for name in _SUMS}


def mean_metrics(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compute the mean `loss` and `accuracy` over all examples of some sums."""
    total = add_sums(parts)
    return {"loss": total["loss"] / total["count"], "accuracy": total["correct"] / total["count"]}


def tagged(scalars: Mapping[str, Any]) -> dict[str, Any]:
    """Replace names by the tags under which they are written; `epoch` and `learning_rate` are their own."""
    return {_TAGS.get(name, name): value for name, value in scalars.items()}


def check_finite(values: dict[str, Any], step: int) -> None:
    """Stop a run whose validation loss is not finite: a TrainingError that names metric and step."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise TrainingError(
                f"{name} is not finite at step {step}: the run stops, its last checkpoint is intact; "
                "lower config.optimizer.learning_rate or set config.grad_clip, in a new --workdir"
            )


class Meter:
    """Collects the metrics of training steps, without waiting for them, until the next report."""

    def __init__(self, batch_size: int, max_skipped_steps: int, earlier: Mapping[str, float] | None = None):
        """Start with the sums of an interrupted run since its last report (`pending_sums`)."""
        self._batch_size = batch_size
        self._max_skipped_steps = max_skipped_steps
        self._earlier = [earlier] if earlier else []
        self._steps: list[Sums] = []
        self._step_times: list[float] = []
        self._compiled = False
        self.start()

    def start(self) -> None:
        """Restart the clock after anything that is not training."""
        self._start = time.monotonic()

    def add(self, metrics: Sums) -> None:
        """Add the metrics of a step that may still be running; the first step includes compilation and is not timed."""
        if not self._compiled:
            self._compiled = True
            self.start()
        self._steps.append(metrics)
        if len(self._steps) > _STEPS_IN_FLIGHT:
            jax.block_until_ready(self._steps[-1 - _STEPS_IN_FLIGHT])

    def pending_sums(self) -> dict[str, float]:
        """Sum the steps since the last report, for a checkpoint; empty if there are none."""
        steps = [*self._earlier, *jax.device_get(self._steps)]
        worst = max((int(metrics["skipped_in_a_row"]) for metrics in steps), default=0)
        return {**add_sums(steps), "skipped_in_a_row": worst} if steps else {}

    def report(self, step: int) -> dict[str, float]:
        """Wait for the steps since the last report (at least one) and sum them up.

        Args:
          step: Number of the last step added.

        Returns:
          `train_loss` and `train_accuracy` over the steps that were not skipped and the other metrics of the last such
          step (all of these are missing if every step was skipped), `skipped_steps` since the run began, `step_time` in
          seconds, `steps_per_second`, `images_per_second`.

        Raises:
          TrainingError: If `max_skipped_steps` steps in a row were skipped.
        """
        total = self.pending_sums()
        steps = [{name: float(value) for name, value in metrics.items()} for metrics in jax.device_get(self._steps)]
        step_time = (time.monotonic() - self._start) / len(steps)
        self._step_times.append(step_time)
        self._earlier, self._steps = [], []
        self.start()
        if total["skipped_in_a_row"] >= self._max_skipped_steps:
            raise TrainingError(
                f"{self._max_skipped_steps} steps in a row up to step {step} were skipped because their loss or "
                "gradient is not finite: the run stops, its last checkpoint is intact; lower "
                "config.optimizer.learning_rate or set config.grad_clip, in a new --workdir"
            )
        gauges = {"skipped_steps": steps[-1]["skipped_steps"]}
        if made := [metrics for metrics in steps if metrics["count"]]:
            gauges |= {name: value for name, value in made[-1].items() if name not in _NOT_GAUGES}
        if total["count"]:
            mean = mean_metrics([total])
            gauges |= {"train_loss": mean["loss"], "train_accuracy": mean["accuracy"]}
        return gauges | {
            "step_time": step_time,
            "steps_per_second": 1 / step_time,
            "images_per_second": self._batch_size / step_time,
        }

    @property
    def step_time_median(self) -> float | None:
        """Median seconds per step over the reports; None if there is none."""
        return statistics.median(self._step_times) if self._step_times else None


def report_text(scalars: dict[str, Any]) -> str:
    """Format epoch, metrics and images per second of a report: `epoch`, and what `Meter.report` returns."""
    metrics = ""
    if "train_loss" in scalars:
        metrics = f"loss {scalars['train_loss']:.4f}  accuracy {scalars['train_accuracy']:.2%}  "
    skipped = f"skipped {scalars['skipped_steps']:.0f} steps  " if scalars["skipped_steps"] else ""
    return f"epoch {scalars['epoch']:.1f}  {metrics}{skipped}{scalars['images_per_second']:.4g} images/s"


def validation_line(step: int, result: Mapping[str, float], best: float) -> str:
    """Format the log line of an evaluation, with the best accuracy so far."""
    return (
        f"step {step}  validation loss {result['validation_loss']:.4f}  "
        f"accuracy {result['validation_accuracy']:.2%}  best {best:.2%}"
    )


class ProgressBar(tqdm):
    """Shows the newest report beside the bar, or logs the reports if the bar is disabled."""

    monitor_interval = 0  # no thread of its own

    def report(self, step: int, scalars: dict[str, Any]) -> None:
        """Show a report; arguments as in `report_text`."""
        if not self.disable:
            self.set_postfix_str(report_text(scalars), refresh=False)
            return
        eta = datetime.timedelta(seconds=round((self.total - step) * scalars["step_time"]))
        place, speed = f"step {step}/{self.total} ({step / self.total:.1%})", scalars["steps_per_second"]
        log.info("%s  %s  %.4g steps/s  ETA %s", place, report_text(scalars), speed, eta)


ProgressBar.set_lock(threading.RLock())  # tqdm's own lock is shared with other processes, which takes a semaphore


@contextlib.contextmanager
def progress_bar(first_step: int, total_steps: int) -> Iterator[ProgressBar]:
    """Open the bar; it is disabled if standard error is not a terminal, in other processes, and if `CI` is set.

    Its `update` counts a step, which may still be running on the device. Log lines are printed above it.
    """
    disable = not (is_primary() and _width() and not os.environ.get("CI"))
    options: dict[str, Any] = {"unit": "step", "file": sys.stderr, "dynamic_ncols": True, "disable": disable}
    bar = ProgressBar(initial=first_step, total=total_steps, **options)
    with contextlib.nullcontext() if disable else logging_redirect_tqdm([log], ProgressBar), bar:
        yield bar


def _width() -> int:
    """Return the columns of the terminal behind standard error; 0 if there is none or its size is unknown."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return 0
