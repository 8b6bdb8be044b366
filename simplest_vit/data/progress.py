"""How far a long piece of work is, in a line every few seconds; and how many cores there are for it."""

import functools
import os
import sys
import time
from collections.abc import Callable

_INTERVAL = 5  # seconds


class Progress:
    """Count images, and tell now and then how many, how fast and how long it will take.

    Args:
      what: What is done.
      total: All there is to do, in any unit.
      tell: Takes each line; by default standard error does.
    """

    def __init__(self, what: str, total: float, tell: Callable[[str], None] | None = None):
        self._what, self._total = what, total
        self._write = tell or functools.partial(print, file=sys.stderr, flush=True)
        self._images, self._done, self._skipped = 0, 0.0, 0.0
        self._start = self._told = time.monotonic()

    def skip(self, amount: float) -> None:
        """Take off what has been done before."""
        self._skipped += amount

    def add(self, images: int, amount: float) -> None:
        """Count images, and how much of the total they were."""
        self._images += images
        self._done += amount
        if time.monotonic() - self._told > _INTERVAL:
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        seconds = self._told - self._start
        to_do = self._total - self._skipped - self._done
        left = to_do / self._done * seconds if self._done else 0.0
        share = 1 - to_do / self._total if self._total else 1.0
        self._write(
            f"{self._what}: {self._images:,} images, {share:.0%}, {self._images / seconds:,.0f} images/s, "
            + (f"{left / 60:.0f} min to go" if left > 100 else f"{left:.0f} s to go")
        )


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
