"""Progress lines for long operations."""

import functools
import sys
import time
from collections.abc import Callable

from simplest_vit import preemption

_REPORT_EVERY = 5  # seconds


class Progress:
    """Counts finished work and reports amount, speed and remaining time every few seconds.

    Args:
      total: The total amount of work, in any unit.
      report: Takes each line; by default, lines go to standard error.
    """

    def __init__(
        self, what: str, total: float, report: Callable[[str], None] | None = None, *, unit: str = "images"
    ) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._report = report or functools.partial(print, file=sys.stderr, flush=True)
        self._count, self._done = 0.0, 0.0
        self._start = self._reported = time.monotonic()

    def add(self, count: float, amount: float) -> None:
        """Count finished items and their share of the total. A signal can stop the program here."""
        preemption.check()
        self._count += count
        self._done += amount
        now = time.monotonic()
        if now - self._reported > _REPORT_EVERY:
            self._reported, seconds = now, now - self._start
            left = (self._total - self._done) / self._done * seconds if self._done else 0.0
            self._report(
                f"{self._what}: {self._count:,.0f} {self._unit}, {self._done / (self._total or 1):.0%}, "
                f"{self._count / seconds:,.0f} {self._unit}/s, {left:.0f} s to go"
            )
