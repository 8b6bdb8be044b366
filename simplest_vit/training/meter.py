"""Training metrics between two reports, and the time that the steps took."""

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax

from simplest_vit.errors import TrainingError
from simplest_vit.training.metrics import Sums, mean_metrics

# Steps that may wait on the device: enough to keep it busy, few enough that their batches fit beside the model.
_STEPS_IN_FLIGHT = 2
_NOT_GAUGES = ("loss", "correct", "count", "skipped_steps", "skipped_in_a_row")


def check_finite(values: dict[str, Any], step: int) -> None:
    """Stop a run whose validation loss is no longer a number.

    Raises:
      TrainingError: Names the metric and the step.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            raise TrainingError(
                f"{name} is not finite at step {step}: the run stops, its last checkpoint is intact; "
                "lower config.optimizer.learning_rate or set config.grad_clip, in a new --workdir"
            )


class Meter:
    """Collects what training steps return, without waiting for them, until it is asked to report."""

    def __init__(self, batch_size: int, max_skipped_steps: int, earlier: Sequence[dict[str, float]] = ()):
        """Start with nothing but the steps of an interrupted run since its last report (`unreported`)."""
        self._batch_size = batch_size
        self._max_skipped_steps = max_skipped_steps
        self._earlier = list(earlier)
        self._steps: list[Sums] = []
        self._step_times: list[float] = []
        self._compiled = False
        self.start()

    def start(self) -> None:
        """Start the clock, behind anything that is not training."""
        self._start = time.monotonic()

    def add(self, metrics: Sums) -> None:
        """Add the metrics of a step that may still be running."""
        self._steps.append(metrics)
        if len(self._steps) > _STEPS_IN_FLIGHT:
            jax.block_until_ready(self._steps[-1 - _STEPS_IN_FLIGHT])

    def unreported(self) -> list[dict[str, float]]:
        """Wait for the steps since the last report; what they returned, for a checkpoint."""
        return self._earlier + [
            {name: float(value) for name, value in metrics.items()} for metrics in jax.device_get(self._steps)
        ]

    def report(self, step: int) -> dict[str, float]:
        """Wait for the steps since the last report, of which there is one at least, and sum them up.

        Args:
          step: Number of the last step added.

        Returns:
          `train_loss` and `train_accuracy` over the steps that were not skipped, the other metrics of the last of them
          under their names (all these are missing where every step was skipped), `skipped_steps` since the run began,
          `step_time` in seconds, `steps_per_second`, `images_per_second`.

        Raises:
          TrainingError: If as many steps in a row were skipped as are allowed.
        """
        steps = self.unreported()
        step_time = (time.monotonic() - self._start) / len(self._steps)
        if self._compiled:
            self._step_times.append(step_time)
        self._compiled = True
        self._earlier, self._steps = [], []
        self.start()
        if max(metrics["skipped_in_a_row"] for metrics in steps) >= self._max_skipped_steps:
            raise TrainingError(
                f"{self._max_skipped_steps} steps in a row up to step {step} were skipped, for their loss or gradient "
                "is not finite: the run stops, its last checkpoint is intact; lower config.optimizer.learning_rate or "
                "set config.grad_clip, in a new --workdir"
            )
        gauges = {"skipped_steps": steps[-1]["skipped_steps"]}
        if made := [metrics for metrics in steps if metrics["count"]]:
            mean = mean_metrics(made)
            gauges |= {name: value for name, value in made[-1].items() if name not in _NOT_GAUGES}
            gauges |= {"train_loss": mean["loss"], "train_accuracy": mean["accuracy"]}
        return gauges | {
            "step_time": step_time,
            "steps_per_second": 1 / step_time,
            "images_per_second": self._batch_size / step_time,
        }

    @property
    def step_time_median(self) -> float | None:
        """Median over the reports of the seconds for a step, less the first, which compiles; None without another."""
        return statistics.median(self._step_times) if self._step_times else None
