"""How far a long piece of work is, in a line every few seconds; and how many cores there are for it."""

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

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
        self._tell = tell or functools.partial(print, file=sys.stderr, flush=True)
        self._images, self._done = 0, 0.0
        self._start = self._told = time.monotonic()

    def add(self, images: int, amount: float) -> None:
        """Count images, and how much of the total they were."""
        self._images += images
        self._done += amount
        now = time.monotonic()
        if now - self._told > _INTERVAL:
            self._told, seconds = now, now - self._start
            left = (self._total - self._done) / self._done * seconds if self._done else 0.0
            self._tell(
                f"{self._what}: {self._images:,} images, {self._done / (self._total or 1):.0%}, "
                f"{self._images / seconds:,.0f} images/s, {left:.0f} s to go"
            )


def cpu_count() -> int:
    """Count the cores that this process may use, by its affinity and by its cgroup's quota, as of a container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # "max 100000" is no quota
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, max(1, quota // period))
    return cores
