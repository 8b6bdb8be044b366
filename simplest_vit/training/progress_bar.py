"""The progress of a run on standard error: a bar on a terminal, lines elsewhere."""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from simplest_vit.training.metrics import report_text, train_line

log = logging.getLogger("simplest_vit")


class _Bar(tqdm):
    monitor_interval = 0  # no thread of its own


_Bar.set_lock(threading.RLock())  # tqdm's own is shared with other processes, for which it makes a semaphore


class ProgressBar:
    """Counts the steps of a run in a bar with the newest report, or logs the reports if there is no bar."""

    def __init__(self, bar: _Bar | None, total_steps: int):
        self._bar, self._total_steps = bar, total_steps

    def add_step(self) -> None:
        """Count a step, which may still be running on the device. The bar is redrawn at most ten times a second."""
        if self._bar is not None:
            self._bar.update()

    def report(self, step: int, scalars: dict[str, Any]) -> None:
        """Show a report: see `train_line`."""
        if self._bar is None:
            log.info(train_line(step, self._total_steps, scalars))
        else:
            self._bar.set_postfix_str(report_text(scalars), refresh=False)


@contextlib.contextmanager
def progress_bar(first_step: int, total_steps: int, *, primary: bool) -> Iterator[ProgressBar]:
    """Open the bar if standard error is a terminal, this is the primary process, and `CI` is not set.

    Meanwhile, log lines are printed above it.
    """
    if not (primary and _width() and not os.environ.get("CI")):
        yield ProgressBar(None, total_steps)
        return
    bar = _Bar(initial=first_step, total=total_steps, unit="step", file=sys.stderr, dynamic_ncols=True)
    with logging_redirect_tqdm([log], _Bar), bar:
        yield ProgressBar(bar, total_steps)


def _width() -> int:
    """Return the columns of the terminal behind standard error; 0 if it is none, or if its size is unknown."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return 0
