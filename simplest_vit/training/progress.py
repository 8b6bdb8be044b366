"""Progress of a run, told on the terminal: one line for each report."""

import datetime
import logging
from typing import Any

log = logging.getLogger("simplest_vit")


def train_line(step: int, total_steps: int, scalars: dict[str, Any]) -> str:
    """Describe the steps since the last report.

    Args:
      step: Steps made.
      total_steps: Steps of the run.
      scalars: `epoch` and what `Meter.report` returns.

    Returns:
      The line.
    """
    eta = datetime.timedelta(seconds=round((total_steps - step) * scalars["step_time"]))
    skipped = f"skipped {scalars['skipped_steps']:.0f} steps  " if scalars["skipped_steps"] else ""
    metrics = (
        f"loss {scalars['train_loss']:.4f}  accuracy {scalars['train_accuracy']:.2%}  "
        if "train_loss" in scalars
        else ""
    )
    return (
        f"step {step}/{total_steps} ({step / total_steps:.1%})  epoch {scalars['epoch']:.1f}  {metrics}{skipped}"
        f"{scalars['steps_per_second']:.4g} steps/s  {scalars['images_per_second']:.4g} images/s  ETA {eta}"
    )


def validation_line(step: int, progress: dict[str, Any]) -> str:
    """Describe an evaluation."""
    return (
        f"step {step}  validation loss {progress['validation_loss']:.4f}  "
        f"accuracy {progress['validation_accuracy']:.2%}  best {progress['best_validation_accuracy']:.2%}"
    )
