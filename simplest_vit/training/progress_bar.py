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

from simplest_vit.primary import is_primary
from simplest_vit.training.metrics import report_text, train_line

log = logging.getLogger("simplest_vit")


class ProgressBar(tqdm):
    """Shows the newest report beside the bar, or logs the reports if the bar is disabled."""

    monitor_interval = 0  # no thread of its own

    def report(self, step: int, scalars: dict[str, Any]) -> None:
        """Show a report: see `train_line`."""
        if self.disable:
            log.info(train_line(step, self.total, scalars))
        else:
            self.set_postfix_str(report_text(scalars), refresh=False)


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
